package compress.sample

/** A loaded model: every output by name. */
interface ModelRunner : AutoCloseable {
    fun run(inputs: Map<String, NumberArray>): Map<String, NumberArray>
}

/** The runtime that this package's model is for. */
fun openRunner(
    source: Source,
    settings: Settings,
): ModelRunner = OnnxRunner(source, settings)
