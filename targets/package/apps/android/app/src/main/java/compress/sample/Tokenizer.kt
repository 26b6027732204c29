package compress.sample

import kotlin.math.max
import kotlin.math.min

/** Token and type ids. */
class Tokens(
    val ids: List<Long>,
    val types: List<Long>,
)

private enum class Kind { PLAIN, DROP, SPACE, PUNCTUATION, WIDE }

private class Special(
    val id: Long,
    val text: List<Int>,
    val left: Boolean,
    val right: Boolean,
)

/** Runs of code points, each with its kind. */
private class Runs(
    lines: List<List<String>>,
) {
    private val sorted = lines.map { Triple(it[1].toInt(16), it[2].toInt(16), Kind.valueOf(it[0].uppercase())) }.sortedBy { it.first }
    private val firsts = IntArray(sorted.size) { sorted[it].first }

    fun kind(code: Int): Kind {
        val found = firsts.binarySearch(code)
        val place = if (found >= 0) found else -found - 2
        return if (place >= 0 && code <= sorted[place].second) sorted[place].third else Kind.PLAIN
    }
}

/** BERT's WordPiece: Devlin et al. (2019). The same ids as the package's `infer.py`. */
class Tokenizer(
    source: Source,
    private val settings: Settings,
) {
    private val vocabulary = readLines(source, "vocabulary.tsv").associate { it[1] to it[0].toLong() }
    private val lines = readLines(source, "characters.tsv")
    private val changed = lines.filter { it[0] == "to" }.associate { it[1].toInt(16) to codesOf(it[2]) }
    private val hangul = lines.any { it[0] == "hangul" }
    private val cleaning = Runs(lines.filter { it[0] == "drop" || it[0] == "wide" })
    private val splitting = Runs(lines.filter { it[0] == "space" || it[0] == "punctuation" })
    private val special = settings.all("special").map { Special(it[0].toLong(), codes(it[1]), it[2] == "1", it[3] == "1") }
    private val prefix = settings.text("prefix")
    private val unknown = settings.text("unknown").toLong()
    private val longestWord = settings.number("longest_word")
    private val longest = settings.number("max_length")

    /** A text, cut to the model's length. */
    fun encode(text: String): Tokens {
        val before = settings.fields("before").map { it.toLong() }
        val after = settings.fields("after").map { it.toLong() }
        val room = max(0, longest - before.size - after.size)
        val ids = before + allIds(codes(text), room).take(room) + after
        return Tokens(ids, ids.map { 0L })
    }

    /** Two texts; the longer one is cut first. */
    fun encodePair(
        first: String,
        second: String,
    ): Tokens {
        val layout = settings.all("pair_part")
        val signs = layout.filter { it[1] != "first" && it[1] != "second" }.sumOf { it.size - 1 }
        val sides = listOf(first, second).map { allIds(codes(it), Int.MAX_VALUE) }
        val lengths = cutLongest(sides[0].size, sides[1].size, max(0, longest - signs))
        val ids = ArrayList<Long>()
        val types = ArrayList<Long>()
        for (part in layout) {
            val found =
                when (part[1]) {
                    "first" -> sides[0].take(lengths.first)
                    "second" -> sides[1].take(lengths.second)
                    else -> part.drop(1).map { it.toLong() }
                }
            ids.addAll(found)
            types.addAll(found.map { part[0].toLong() })
        }
        return Tokens(ids, types)
    }

    private fun cutLongest(
        first: Int,
        second: Int,
        room: Int,
    ): Pair<Int, Int> {
        var low = min(first, second)
        var high = max(first, second)
        if (low + high > room) high = if (low > room) low else max(low, room - low)
        if (low + high > room) {
            low = room / 2
            high = room / 2 + room % 2
        }
        return if (first <= second) Pair(low, high) else Pair(high, low)
    }

    private fun allIds(
        text: List<Int>,
        enough: Int,
    ): List<Long> {
        val ids = ArrayList<Long>()
        var start = 0
        var at = 0
        while (at < text.size && ids.size < enough) {
            val found = special.firstOrNull { startsWith(text, at, it.text) }
            if (found == null) {
                at++
                continue
            }
            var before = at
            while (found.left && before > start && splitting.kind(text[before - 1]) == Kind.SPACE) before--
            addWords(text.subList(start, before), ids)
            if (ids.size < enough) ids.add(found.id)
            at += found.text.size
            while (found.right && at < text.size && splitting.kind(text[at]) == Kind.SPACE) at++
            start = at
        }
        if (ids.size < enough) addWords(text.subList(start, text.size), ids)
        return ids
    }

    private fun startsWith(
        text: List<Int>,
        at: Int,
        part: List<Int>,
    ): Boolean = at + part.size <= text.size && part.indices.all { text[at + it] == part[it] }

    private fun normalized(text: List<Int>): List<Int> {
        val made = ArrayList<Int>()
        for (code in text) {
            val kind = cleaning.kind(code)
            if (kind == Kind.DROP) continue
            if (kind == Kind.WIDE) made.add(' '.code)
            made.addAll(if (hangul && code in 0xAC00..0xD7A3) jamo(code - 0xAC00) else changed[code] ?: listOf(code))
            if (kind == Kind.WIDE) made.add(' '.code)
        }
        return made
    }

    /** A Hangul syllable falls apart by arithmetic: Unicode Standard, section 3.12. */
    private fun jamo(index: Int): List<Int> {
        val made = listOf(0x1100 + index / 588, 0x1161 + index % 588 / 28)
        return if (index % 28 == 0) made else made + (0x11A7 + index % 28)
    }

    private fun addWords(
        text: List<Int>,
        ids: MutableList<Long>,
    ) {
        val word = ArrayList<Int>()
        for (code in normalized(text)) {
            val kind = splitting.kind(code)
            if (kind == Kind.PLAIN) {
                word.add(code)
                continue
            }
            if (word.isNotEmpty()) ids.addAll(pieces(word))
            word.clear()
            if (kind == Kind.PUNCTUATION) ids.addAll(pieces(listOf(code)))
        }
        if (word.isNotEmpty()) ids.addAll(pieces(word))
    }

    private fun pieces(word: List<Int>): List<Long> {
        val ids = ArrayList<Long>()
        var start = 0
        while (start < word.size && word.size <= longestWord) {
            val head = if (start == 0) "" else prefix
            val end = (word.size downTo start + 1).firstOrNull { head + text(word, start, it) in vocabulary }
            if (end == null) return listOf(unknown)
            ids.add(vocabulary.getValue(head + text(word, start, end)))
            start = end
        }
        return if (ids.isEmpty()) listOf(unknown) else ids
    }

    private fun text(
        word: List<Int>,
        start: Int,
        end: Int,
    ): String = String(word.subList(start, end).toIntArray(), 0, end - start)

    private fun codesOf(hex: String): List<Int> = hex.split(' ').filter { it.isNotEmpty() }.map { it.toInt(16) }
}

/** Unicode code points; half a pair of surrogates becomes U+FFFD, as in UTF-8. */
fun codes(text: String): List<Int> = text.codePoints().toArray().map { if (it in 0xD800..0xDFFF) 0xFFFD else it }

/** Ids as the model's inputs, shape (1, tokens); padded only where the model's shape is fixed. */
fun textInput(
    tokens: Tokens,
    settings: Settings,
): Map<String, NumberArray> {
    val names = settings.fields("names")
    return settings.ports("input").filter { it.name in names }.associate { port ->
        val mask = "mask" in port.name
        val kind = !mask && ("type" in port.name || "segment" in port.name)
        val fixed = port.shape.size == 2 && port.shape[1] > 0
        val size = if (fixed) port.shape[1].toInt() else tokens.ids.size
        val pad = if (mask || kind) 0.0 else settings.text("pad_id").toDouble()
        val values =
            DoubleArray(size) { place ->
                when {
                    place >= tokens.ids.size -> pad
                    mask -> 1.0
                    kind -> tokens.types[place].toDouble()
                    else -> tokens.ids[place].toDouble()
                }
            }
        port.name to NumberArray.of(port.type, longArrayOf(1, size.toLong()), values)
    }
}
