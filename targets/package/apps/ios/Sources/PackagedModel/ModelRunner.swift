import Foundation

/// The runtime that this package's model is for.
func openRunner(folder: URL, settings: Settings) throws -> ModelRunner {
    try OnnxRunner(folder: folder, settings: settings)
}

/// A loaded model: every output by name.
protocol ModelRunner {
    func run(_ given: [String: NumberArray]) throws -> [String: NumberArray]
}
