import CoreGraphics
import Foundation

/// The packaged model: inputs from pictures and texts, answers by label, and the stored samples to check both.
public final class PackagedModel {
    private let settings: Settings
    private let samples: [Sample]
    private let runner: ModelRunner
    private let tokenizer: Tokenizer?

    /// Opens the resources of this package, or a folder like them.
    public init(folder: URL? = nil) throws {
        guard let place = folder ?? Bundle.module.url(forResource: "Resources", withExtension: nil) else {
            throw Refusal("the resources of the package are not there")
        }
        settings = try Settings(folder: place)
        samples = try readSamples(folder: place)
        runner = try openRunner(folder: place, settings: settings)
        let words = try settings.text("preprocess") == "text" && settings.text("tokenizer") == "wordpiece"
        tokenizer = words ? try Tokenizer(folder: place, settings: settings) : nil
    }

    public var wantsPicture: Bool {
        (try? settings.text("preprocess")) == "image"
    }

    /// Shares by label, the largest first; the bare numbers of the first output where it is not one of classes.
    public func classify(_ image: CGImage) throws -> [(label: String, share: Double)] {
        try scores(try runner.run(try pictureInputs(try Picture(image))))
    }

    /// The same for a text: a sentence, two with a tab between them, or token ids where no tokenizer is built in.
    public func classify(_ text: String) throws -> [(label: String, share: Double)] {
        let texts = text.split(separator: "\t", omittingEmptySubsequences: false).map(String.init)
        return try scores(try runner.run(try textInputs(texts)))
    }

    /// Every stored sample again: its pre-processing and its answers. Returns what is wrong, and how far answers are.
    public func selfCheck() throws -> (problems: [String], worst: Double) {
        guard let tolerance = Double(try settings.text("tolerance")) else { throw Refusal("no tolerance") }
        var problems: [String] = []
        var worst = 0.0
        for (index, sample) in samples.enumerated() {
            problems += try inputProblems(index, sample)
            let found = try runner.run(sample.input)
            for (name, wanted) in sample.output {
                let distance = try found[name].map { try difference($0, wanted) } ?? Double.infinity
                worst = max(worst, distance)
                if !(distance <= tolerance) {
                    problems.append("sample \(index), \(name): differs by \(distance)")
                }
            }
        }
        return (problems, worst)
    }

    private func pictureInputs(_ picture: Picture) throws -> [String: NumberArray] {
        [try settings.ports("input")[0].name: try pictureInput(picture, settings)]
    }

    private func textInputs(_ texts: [String]) throws -> [String: NumberArray] {
        guard let tokenizer else {
            let ids = try texts[0].split(separator: " ").map { try whole(String($0)) }
            return try textInput(Tokens(ids: ids, types: ids.map { _ in 0 }), settings)
        }
        if try settings.number("pair") == 1 {
            guard texts.count == 2 else { throw Refusal("this model takes two texts: put a tab between them") }
            return try textInput(try tokenizer.encode(texts[0], texts[1]), settings)
        }
        return try textInput(tokenizer.encode(texts.joined(separator: "\t")), settings)
    }

    private func inputProblems(_ index: Int, _ sample: Sample) throws -> [String] {
        guard let raw = sample.raw.first else { return [] }
        var made: [String: NumberArray] = [:]
        if raw.type == "text", tokenizer != nil {
            made = try textInputs(sample.raw.map { String(decoding: $0.bytes, as: UTF8.self) })
        } else if raw.type != "text", wantsPicture {
            made = try pictureInputs(Picture(stored: raw))
        }
        var problems: [String] = []
        for (name, array) in made {
            guard let stored = sample.input[name], try difference(array, stored) <= 1e-5 else {
                problems.append("sample \(index), \(name): pre-processing gives another input")
                continue
            }
        }
        return problems
    }

    private func scores(_ outputs: [String: NumberArray]) throws -> [(label: String, share: Double)] {
        guard let values = try outputs[try settings.ports("output")[0].name]?.values() else {
            throw Refusal("the model has no output")
        }
        var shares = values
        switch try settings.text("postprocess") {
        case "softmax":
            let largest = values.max() ?? 0
            let powers = values.map { exp($0 - largest) }
            let sum = powers.reduce(0, +)
            shares = powers.map { $0 / sum }
        case "sigmoid":
            shares = values.map { 1 / (1 + exp(-$0)) }
        case "probabilities", "independent-probabilities":
            break
        default:
            return values.enumerated().map { (String($0.offset), $0.element) }
        }
        let labels = settings.labels()
        let named = shares.enumerated().map { item in
            (label: item.offset < labels.count ? labels[item.offset] : String(item.offset), share: item.element)
        }
        return named.sorted { $0.share > $1.share }
    }

    /// Largest absolute difference over the largest magnitude that was wanted.
    private func difference(_ found: NumberArray, _ wanted: NumberArray) throws -> Double {
        guard found.shape == wanted.shape else { return Double.infinity }
        let want = try wanted.values()
        let scale = max(want.map { abs($0) }.max() ?? 0, 1e-12)
        let distances = zip(try found.values(), want).map { abs($0 - $1) }
        return (distances.max() ?? 0) / scale
    }
}
