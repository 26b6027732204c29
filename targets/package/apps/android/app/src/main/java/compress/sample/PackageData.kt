package compress.sample

import java.io.ByteArrayOutputStream
import java.io.InputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.pow

/** Opens a file of the package's data by name. */
typealias Source = (String) -> InputStream

/** Something the user can mend. */
class RefusalException(
    message: String,
) : Exception(message)

/** Name, NumPy's name of the type, and shape (-1: any size) of an input or output. */
class Port(
    val name: String,
    val type: String,
    val shape: LongArray,
)

/** An array as it lies in memory, little endian. [type] is NumPy's name of it, or "text". */
class NumberArray(
    val type: String,
    val shape: LongArray,
    val bytes: ByteArray,
) {
    /** A direct buffer of the bytes, as runtimes want them. */
    fun buffer(): ByteBuffer {
        val made = ByteBuffer.allocateDirect(bytes.size).order(ByteOrder.nativeOrder())
        made.put(bytes)
        made.rewind()
        return made
    }

    fun values(): DoubleArray {
        val from = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)
        return DoubleArray(bytes.size / width(type)) { read(from) }
    }

    private fun read(from: ByteBuffer): Double =
        when (type) {
            "float32" -> from.getFloat().toDouble()
            "float64" -> from.getDouble()
            "float16" -> half(from.getShort().toInt())
            "int64" -> from.getLong().toDouble()
            "int32" -> from.getInt().toDouble()
            "int8" -> from.get().toDouble()
            else -> (from.get().toInt() and 255).toDouble()
        }

    companion object {
        fun width(type: String): Int =
            when (type) {
                "float64", "int64" -> 8
                "float32", "int32" -> 4
                "float16" -> 2
                "uint8", "int8", "bool" -> 1
                else -> throw RefusalException("arrays of type $type are not handled here")
            }

        /** IEEE 754 half precision. */
        private fun half(bits: Int): Double {
            val exponent = bits shr 10 and 31
            val fraction = bits and 1023
            val size =
                when (exponent) {
                    0 -> fraction * 2.0.pow(-24)
                    31 -> if (fraction == 0) Double.POSITIVE_INFINITY else Double.NaN
                    else -> (1024 + fraction) * 2.0.pow(exponent - 25)
                }
            return if (bits and 0x8000 != 0) -size else size
        }

        /** Numbers as an array of [type]. */
        fun of(
            type: String,
            shape: LongArray,
            values: DoubleArray,
        ): NumberArray {
            val made = ByteBuffer.allocate(values.size * width(type)).order(ByteOrder.LITTLE_ENDIAN)
            for (value in values) {
                when (type) {
                    "float32" -> made.putFloat(value.toFloat())
                    "float64" -> made.putDouble(value)
                    "int64" -> made.putLong(value.toLong())
                    "int32" -> made.putInt(value.toInt())
                    "uint8", "int8", "bool" -> made.put(value.toInt().toByte())
                    else -> throw RefusalException("arrays of type $type are not made here")
                }
            }
            return NumberArray(type, shape, made.array())
        }
    }
}

/** A stored sample: model inputs and answers by name, and what it was before pre-processing. */
class Sample {
    val input = LinkedHashMap<String, NumberArray>()
    val output = LinkedHashMap<String, NumberArray>()
    val raw = ArrayList<NumberArray>()
}

/** The lines of `settings.tsv` by key. */
class Settings(
    source: Source,
) {
    private val lines = readLines(source, "settings.tsv").groupBy({ it[0] }, { it.drop(1) })

    fun all(key: String): List<List<String>> = lines[key] ?: emptyList()

    fun fields(key: String): List<String> = lines[key]?.last() ?: throw RefusalException("settings.tsv has no `$key`")

    fun text(key: String): String = fields(key).firstOrNull() ?: throw RefusalException("settings.tsv has no value of `$key`")

    fun number(key: String): Int = text(key).toInt()

    fun ports(key: String): List<Port> = all(key).map { Port(it[0], it[1], integers(it[2])) }

    fun labels(): List<String> = all("label").map { it[0] }
}

/** Tab-separated lines, unescaped. */
fun readLines(
    source: Source,
    name: String,
): List<List<String>> {
    val text = String(readAll(source, name), Charsets.UTF_8)
    return text.split('\n').dropLast(1).map { line -> line.split('\t').map(::unescaped) }
}

fun readAll(
    source: Source,
    name: String,
): ByteArray {
    val made = ByteArrayOutputStream()
    source(name).use { it.copyTo(made) }
    return made.toByteArray()
}

private fun unescaped(field: String): String {
    if ('\\' !in field) return field
    val made = StringBuilder()
    var at = 0
    while (at < field.length) {
        val escape = field[at] == '\\' && at + 1 < field.length
        val sign = field[if (escape) at + 1 else at]
        made.append(
            when {
                escape && sign == 't' -> '\t'
                escape && sign == 'n' -> '\n'
                escape && sign == 'r' -> '\r'
                else -> sign
            },
        )
        at += if (escape) 2 else 1
    }
    return made.toString()
}

fun integers(text: String): LongArray =
    text
        .split(',')
        .filter { it.isNotEmpty() }
        .map { it.toLong() }
        .toLongArray()

fun readSamples(source: Source): List<Sample> {
    val bytes = readAll(source, "samples.bin")
    val samples = ArrayList<Sample>()
    for (line in readLines(source, "samples.tsv")) {
        val index = line[0].toInt()
        val start = line[5].toInt()
        while (samples.size <= index) samples.add(Sample())
        val array = NumberArray(line[3], integers(line[4]), bytes.copyOfRange(start, start + line[6].toInt()))
        when (line[1]) {
            "raw" -> samples[index].raw.add(array)
            "input" -> samples[index].input[line[2]] = array
            "output" -> samples[index].output[line[2]] = array
        }
    }
    return samples
}
