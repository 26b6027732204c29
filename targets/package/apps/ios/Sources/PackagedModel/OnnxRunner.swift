import Foundation
import OnnxRuntimeBindings

/// ONNX Runtime on the CPU, with the threads and graph level under which the package's figures were taken.
final class OnnxRunner: ModelRunner {
    private let environment: ORTEnv
    private let session: ORTSession
    private let inputs: [String]
    private let outputs: [String]

    init(folder: URL, settings: Settings) throws {
        let runtime = try settings.fields("runtime") // name, threads, graph level, arena
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(Int32(try whole(runtime[1])))
        try options.setGraphOptimizationLevel(OnnxRunner.level(runtime[2]))
        environment = try ORTEnv(loggingLevel: .error)
        let path = folder.appendingPathComponent(try settings.text("model")).path
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: options)
        inputs = try session.inputNames()
        outputs = try session.outputNames()
    }

    /// Every output by name.
    func run(_ given: [String: NumberArray]) throws -> [String: NumberArray] {
        var values: [String: ORTValue] = [:]
        for name in inputs {
            guard let array = given[name] else { throw Refusal("the model's input `\(name)` is not given") }
            values[name] = try ORTValue(
                tensorData: NSMutableData(data: array.bytes),
                elementType: try OnnxRunner.element(array.type),
                shape: array.shape.map { NSNumber(value: $0) }
            )
        }
        let found = try session.run(withInputs: values, outputNames: Set(outputs), runOptions: nil)
        return try found.mapValues { value in
            let facts = try value.tensorTypeAndShapeInfo()
            let bytes = try value.tensorData() as Data
            return NumberArray(type: try OnnxRunner.name(facts.elementType), shape: facts.shape.map(\.intValue), bytes: bytes)
        }
    }

    private static func level(_ name: String) -> ORTGraphOptimizationLevel {
        switch name {
        case "disabled": return .none
        case "basic": return .basic
        case "extended": return .extended
        default: return .all
        }
    }

    private static func element(_ name: String) throws -> ORTTensorElementDataType {
        switch name {
        case "float32": return .float
        case "int64": return .int64
        case "int32": return .int32
        case "uint8": return .uInt8
        case "int8": return .int8
        default: throw Refusal("tensors of type \(name) are not handled here")
        }
    }

    private static func name(_ type: ORTTensorElementDataType) throws -> String {
        switch type {
        case .float: return "float32"
        case .int64: return "int64"
        case .int32: return "int32"
        case .uInt8: return "uint8"
        case .int8: return "int8"
        default: throw Refusal("the model has an output of a type that is not handled here")
        }
    }
}
