import CoreML
import Foundation

/// Core ML on the compute units of the profile. The program has fixed shapes: inputs are filled up with zeros along the
/// sequence, and outputs of that length are cut again.
final class CoreMlRunner: ModelRunner {
    private let model: MLModel
    private let outputs: [Port]

    /// Compiles the package for this device, as Xcode would, and loads it.
    init(folder: URL, settings: Settings) throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = try CoreMlRunner.units(try settings.text("compute_units"))
        let package = folder.appendingPathComponent(try settings.text("model"))
        let compiled = try MLModel.compileModel(at: package) // in a temporary folder, which the system empties
        model = try MLModel(contentsOf: compiled, configuration: configuration)
        outputs = try settings.ports("output")
    }

    func run(_ given: [String: NumberArray]) throws -> [String: NumberArray] {
        var features: [String: MLFeatureValue] = [:]
        for (name, description) in model.modelDescription.inputDescriptionsByName {
            guard let array = given[name], let wanted = description.multiArrayConstraint else {
                throw Refusal("the model's input `\(name)` is not given, or is no array")
            }
            features[name] = MLFeatureValue(multiArray: try filledUp(array, wanted))
        }
        let found = try model.prediction(from: try MLDictionaryFeatureProvider(dictionary: features))
        let size = given.values.first?.shape ?? []
        var made: [String: NumberArray] = [:]
        for port in outputs {
            guard let array = found.featureValue(for: port.name)?.multiArrayValue else {
                throw Refusal("the model has no output `\(port.name)`")
            }
            made[port.name] = try cut(array, port, size)
        }
        return made
    }

    private func filledUp(_ array: NumberArray, _ wanted: MLMultiArrayConstraint) throws -> MLMultiArray {
        let shape = wanted.shape.map(\.intValue)
        guard array.shape.count == shape.count, zip(array.shape, shape).allSatisfy({ $0 <= $1 }) else {
            throw Refusal("an input of shape \(array.shape) is longer than the compiled model takes: \(shape)")
        }
        let values = fitted(try array.values(), from: array.shape, to: shape)
        switch wanted.dataType {
        case .int32: return MLMultiArray(MLShapedArray<Int32>(scalars: values.map { Int32($0) }, shape: shape))
        case .float32: return MLMultiArray(MLShapedArray<Float>(scalars: values.map { Float($0) }, shape: shape))
        default: throw Refusal("inputs of this type are not handled here")
        }
    }

    /// Core ML may give float16 and rows with gaps between them; converting makes both plain.
    private func cut(_ array: MLMultiArray, _ port: Port, _ size: [Int]) throws -> NumberArray {
        let plain = MLShapedArray<Float>(converting: array)
        var shape = plain.shape
        for axis in shape.indices where axis < port.shape.count && port.shape[axis] < 0 {
            shape[axis] = min(shape[axis], size[min(axis, 1)])
        }
        let values = fitted(plain.scalars.map(Double.init), from: plain.shape, to: shape)
        return try NumberArray(type: "float32", shape: shape, values: values)
    }

    private static func units(_ name: String) throws -> MLComputeUnits {
        switch name {
        case "all": return .all
        case "cpu": return .cpuOnly
        case "cpu-and-gpu": return .cpuAndGPU
        case "cpu-and-neural-engine": return .cpuAndNeuralEngine
        default: throw Refusal("compute units `\(name)` are not known")
        }
    }
}

/// The values at their places in an array of another shape: cut where it is smaller, zero where it is larger.
private func fitted(_ values: [Double], from: [Int], to shape: [Int]) -> [Double] {
    if from == shape {
        return values
    }
    return (0..<shape.reduce(1, *)).map { place in
        var rest = place
        var there = 0
        var step = 1
        for axis in shape.indices.reversed() {
            let index = rest % shape[axis]
            rest /= shape[axis]
            if index >= from[axis] {
                return 0
            }
            there += index * step
            step *= from[axis]
        }
        return values[there]
    }
}
