package compress.sample

import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min
import kotlin.math.round
import kotlin.math.truncate

/** 8-bit pixels, rows of (height, width, channels); 1 or 3 channels. */
class Picture(
    val height: Int,
    val width: Int,
    val channels: Int,
    val pixels: ByteArray,
) {
    fun at(place: Int): Int = pixels[place].toInt() and 255
}

private const val BITS = 32 - 8 - 2 // fractional bits of a filter's weights

/** The model's input from a picture: channels, size, `(pixel * scale - mean) / std`, layout; with a batch axis. */
fun pictureInput(
    given: Picture,
    settings: Settings,
): NumberArray {
    val size = settings.fields("size").map { it.toInt() }
    val plain = toChannels(given, settings.number("channels"))
    val picture = if (size.size == 2) resize(plain, size[0], size[1], settings.text("resample")) else plain
    val type = settings.ports("input").first().type
    val mean = settings.fields("mean").map { it.toFloat() }
    val deviation = settings.fields("std").map { it.toFloat() }
    val scale = settings.text("scale").toFloat()
    val planes = settings.text("layout") == "NCHW"
    val area = picture.height * picture.width
    val values = DoubleArray(area * picture.channels)
    for (place in 0 until area) {
        for (channel in 0 until picture.channels) {
            val pixel = picture.at(place * picture.channels + channel).toFloat()
            var value = (pixel * scale - mean[channel % mean.size]) / deviation[channel % deviation.size]
            if (!type.startsWith("float")) value = min(max(round(value), 0f), 255f)
            values[if (planes) channel * area + place else place * picture.channels + channel] = value.toDouble()
        }
    }
    val sizes = listOf(picture.height, picture.width).map { it.toLong() }
    val channels = listOf(picture.channels.toLong())
    val shape = listOf(1L) + if (planes) channels + sizes else sizes + channels
    return NumberArray.of(type, shape.toLongArray(), values)
}

/** A stored (height, width) or (height, width, channels) array of uint8. */
fun pictureOf(array: NumberArray): Picture {
    val channels = if (array.shape.size == 3) array.shape[2].toInt() else 1
    return Picture(array.shape[0].toInt(), array.shape[1].toInt(), channels, array.bytes)
}

/** Grey is repeated, colour becomes ITU-R 601 luma in fixed point. */
private fun toChannels(
    from: Picture,
    channels: Int,
): Picture {
    if (from.channels == channels || channels !in listOf(1, 3)) return from
    val area = from.height * from.width
    val pixels =
        if (channels == 3) {
            ByteArray(area * 3) { from.pixels[it / 3] }
        } else {
            ByteArray(area) {
                val sum = 19595L * from.at(it * 3) + 38470L * from.at(it * 3 + 1) + 7471L * from.at(it * 3 + 2)
                (sum + 0x8000 shr 16).toByte()
            }
        }
    return Picture(from.height, from.width, channels, pixels)
}

private fun resize(
    from: Picture,
    height: Int,
    width: Int,
    resample: String,
): Picture {
    if (resample == "nearest") return pick(from, nearest(from.height, height), nearest(from.width, width))
    val cubic = resample == "bicubic"
    val wide = if (from.width == width) from else convolve(from, width, cubic, columns = true)
    return if (wide.height == height) wide else convolve(wide, height, cubic, columns = false)
}

private fun pick(
    from: Picture,
    rows: IntArray,
    columns: IntArray,
): Picture {
    val pixels = ByteArray(rows.size * columns.size * from.channels)
    for (place in pixels.indices) {
        val channel = place % from.channels
        val column = columns[place / from.channels % columns.size]
        val row = rows[place / from.channels / columns.size]
        pixels[place] = from.pixels[(row * from.width + column) * from.channels + channel]
    }
    return Picture(rows.size, columns.size, from.channels, pixels)
}

/** Source index of every pixel; the sum runs up as Pillow's does. */
private fun nearest(
    old: Int,
    new: Int,
): IntArray {
    val scale = old.toDouble() / new
    var at = scale * 0.5
    return IntArray(new) {
        val place = min(at.toInt(), old - 1)
        at += scale
        place
    }
}

/** Keys (1981), a = -0.5, for bicubic; a triangle for bilinear. */
private fun kernel(
    place: Double,
    cubic: Boolean,
): Double {
    val x = abs(place)
    return when {
        !cubic -> max(0.0, 1.0 - x)
        x < 1 -> ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1
        x < 2 -> (((x - 5) * x + 8) * x - 4) * -0.5
        else -> 0.0
    }
}

private class Window(
    val first: Int,
    val weights: LongArray,
)

/** Weights of a filter that widens when the picture shrinks. */
private fun windows(
    old: Int,
    new: Int,
    cubic: Boolean,
): List<Window> {
    val scale = old.toDouble() / new
    val stretch = max(scale, 1.0)
    val support = (if (cubic) 2.0 else 1.0) * stretch
    return (0 until new).map { at ->
        val centre = (at + 0.5) * scale
        val first = max((centre - support + 0.5).toInt(), 0)
        val last = min((centre + support + 0.5).toInt(), old)
        val weights = (first until last).map { kernel((it - centre + 0.5) * (1.0 / stretch), cubic) }
        val sum = weights.sum()
        Window(first, LongArray(weights.size) { fixed(weights[it] / sum) })
    }
}

private fun fixed(weight: Double): Long = truncate(weight * (1 shl BITS) + if (weight < 0) -0.5 else 0.5).toLong()

/** Resample the rows, or the columns, to [size] places. */
private fun convolve(
    from: Picture,
    size: Int,
    cubic: Boolean,
    columns: Boolean,
): Picture {
    val windows = windows(if (columns) from.width else from.height, size, cubic)
    val height = if (columns) from.height else size
    val width = if (columns) size else from.width
    val row = from.width * from.channels
    val step = if (columns) from.channels else row
    val pixels = ByteArray(height * width * from.channels)
    for (place in pixels.indices) {
        val channel = place % from.channels
        val x = place / from.channels % width
        val y = place / from.channels / width
        val window = windows[if (columns) x else y]
        val start = window.first * step + if (columns) y * row else x * from.channels
        var total = 1L shl BITS - 1
        for ((index, weight) in window.weights.withIndex()) total += weight * from.at(start + index * step + channel)
        pixels[place] = (total shr BITS).coerceIn(0, 255).toByte()
    }
    return Picture(height, width, from.channels, pixels)
}
