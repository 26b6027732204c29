package compress.sample

import java.util.Locale
import kotlin.math.abs
import kotlin.math.exp
import kotlin.math.max

/** The packaged model: inputs from pictures and texts, answers by label, and the stored samples to check both. */
class PackagedModel(
    source: Source,
    open: (Source, Settings) -> ModelRunner = ::openRunner,
) : AutoCloseable {
    private val settings = Settings(source)
    private val samples = readSamples(source)
    private val runner = open(source, settings)
    private val words = wantsText && settings.text("tokenizer") == "wordpiece"
    private val tokenizer = if (words) Tokenizer(source, settings) else null

    val name: String get() = settings.text("name")
    val wantsPicture: Boolean get() = settings.text("preprocess") == "image"
    val wantsText: Boolean get() = settings.text("preprocess") == "text"

    /** Shares by label, the largest first; the bare numbers of the first output where it is not one of classes. */
    fun classify(picture: Picture): List<Pair<String, Double>> = scores(runner.run(pictureInputs(picture)))

    /** The same for a text: a sentence, two with a tab between them, or token ids where no tokenizer is built in. */
    fun classify(text: String): List<Pair<String, Double>> = scores(runner.run(textInputs(text.split('\t'))))

    fun pictureInputs(picture: Picture): Map<String, NumberArray> =
        mapOf(settings.ports("input").first().name to pictureInput(picture, settings))

    fun textInputs(texts: List<String>): Map<String, NumberArray> {
        val plain = tokenizer
        if (plain == null) {
            val ids = texts[0].split(' ').map { it.toLong() }
            return textInput(Tokens(ids, ids.map { 0L }), settings)
        }
        val pair = settings.number("pair") == 1
        if (pair && texts.size != 2) throw RefusalException("this model takes two texts: put a tab between them")
        val tokens = if (pair) plain.encodePair(texts[0], texts[1]) else plain.encode(texts.joinToString("\t"))
        return textInput(tokens, settings)
    }

    /** Every stored sample again: its pre-processing and its answers. The text says how far they are. */
    fun selfCheck(): String {
        val tolerance = settings.text("tolerance").toDouble()
        val problems = ArrayList<String>()
        var worst = 0.0
        for ((index, sample) in samples.withIndex()) {
            problems += inputProblems(index, sample)
            val found = runner.run(sample.input)
            for ((name, wanted) in sample.output) {
                val difference = difference(found.getValue(name), wanted)
                worst = max(worst, difference)
                if (!(difference <= tolerance)) problems += "sample $index, $name: differs by $difference"
            }
        }
        val verdict = if (problems.isEmpty()) "passed" else "FAILED"
        val text = String.format(Locale.ROOT, "%d samples, worst relative difference %.3g", samples.size, worst)
        return (listOf("self-check $verdict: $text (accepted $tolerance)") + problems).joinToString("\n")
    }

    /** What pre-processing makes of a stored sample, against its stored input. */
    fun inputProblems(
        index: Int,
        sample: Sample,
    ): List<String> {
        val raw = sample.raw.firstOrNull() ?: return emptyList()
        val made =
            when {
                raw.type == "text" && tokenizer == null -> emptyMap()
                raw.type == "text" -> textInputs(sample.raw.map { String(it.bytes, Charsets.UTF_8) })
                wantsPicture -> pictureInputs(pictureOf(raw))
                else -> emptyMap()
            }
        return made
            .filter { (name, array) -> !(difference(array, sample.input.getValue(name)) <= 1e-5) }
            .map { "sample $index, ${it.key}: pre-processing gives another input" }
    }

    fun stored(): List<Sample> = samples

    fun scores(outputs: Map<String, NumberArray>): List<Pair<String, Double>> {
        val name = settings.ports("output").first().name
        val values = outputs.getValue(name).values()
        val shares =
            when (settings.text("postprocess")) {
                "softmax" -> softmax(values)
                "sigmoid" -> values.map { 1 / (1 + exp(-it)) }
                "probabilities", "independent-probabilities" -> values.toList()
                else -> return values.mapIndexed { place, value -> place.toString() to value }
            }
        val labels = settings.labels()
        val named = shares.mapIndexed { place, share -> (labels.getOrNull(place) ?: place.toString()) to share }
        return named.sortedByDescending { it.second }
    }

    private fun softmax(values: DoubleArray): List<Double> {
        val largest = values.max()
        val powers = values.map { exp(it - largest) }
        val sum = powers.sum()
        return powers.map { it / sum }
    }

    /** Largest absolute difference over the largest magnitude that was wanted. */
    private fun difference(
        found: NumberArray,
        wanted: NumberArray,
    ): Double {
        if (!found.shape.contentEquals(wanted.shape)) return Double.POSITIVE_INFINITY
        val have = found.values()
        val want = wanted.values()
        val scale = max(want.maxOfOrNull { abs(it) } ?: 0.0, 1e-12)
        return (want.indices.maxOfOrNull { abs(have[it] - want[it]) } ?: 0.0) / scale
    }

    override fun close() {
        runner.close()
    }
}
