package compress.sample

import org.tensorflow.lite.DataType
import org.tensorflow.lite.Interpreter
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.min

private const val SIGNATURE = "serving_default"

/**
 * LiteRT on the CPU (XNNPACK). The file has fixed shapes: inputs are filled up with zeros along the sequence, and outputs
 * of that length are cut again.
 */
class LiteRtRunner(
    source: Source,
    private val settings: Settings,
) : ModelRunner {
    private val model: ByteBuffer = NumberArray("uint8", longArrayOf(), readAll(source, settings.text("model"))).buffer()
    private val interpreter = Interpreter(model, Interpreter.Options().setNumThreads(settings.fields("runtime")[1].toInt()))

    override fun run(inputs: Map<String, NumberArray>): Map<String, NumberArray> {
        val given = HashMap<String, Any>()
        for (name in interpreter.getSignatureInputs(SIGNATURE)) {
            val tensor = interpreter.getInputTensorFromSignature(name, SIGNATURE)
            val shape = tensor.shape().map { it.toLong() }.toLongArray()
            given[name] = filledUp(inputs.getValue(name), shape, nameOf(tensor.dataType())).buffer()
        }
        val made = HashMap<String, Any>()
        for (name in interpreter.getSignatureOutputs(SIGNATURE)) {
            val tensor = interpreter.getOutputTensorFromSignature(name, SIGNATURE)
            made[name] = ByteBuffer.allocateDirect(tensor.numBytes()).order(ByteOrder.nativeOrder())
        }
        interpreter.runSignature(given, made, SIGNATURE)
        return made.mapValues { (name, buffer) -> outputOf(name, buffer as ByteBuffer, inputs) }
    }

    private fun outputOf(
        name: String,
        buffer: ByteBuffer,
        inputs: Map<String, NumberArray>,
    ): NumberArray {
        val tensor = interpreter.getOutputTensorFromSignature(name, SIGNATURE)
        val bytes = ByteArray(buffer.capacity())
        buffer.rewind()
        buffer.get(bytes)
        val shape = tensor.shape().map { it.toLong() }.toLongArray()
        val found = NumberArray(nameOf(tensor.dataType()), shape, bytes)
        val port = settings.ports("output").firstOrNull { it.name == name } ?: return found
        val length =
            inputs.values
                .first()
                .shape
                .getOrElse(1) { 0 }
        val free = port.shape.indices.filter { it > 0 && port.shape[it] < 0 }
        val wanted = shape.copyOf()
        for (axis in free) wanted[axis] = min(wanted[axis], length)
        return if (wanted.contentEquals(shape)) found else fitted(found, wanted, found.type)
    }

    private fun filledUp(
        array: NumberArray,
        shape: LongArray,
        type: String,
    ): NumberArray {
        if (array.shape.contentEquals(shape) && array.type == type) return array
        if (array.shape.size != shape.size || shape.indices.any { array.shape[it] > shape[it] }) {
            throw RefusalException("the input is longer than the compiled model takes")
        }
        return fitted(array, shape, type)
    }

    /** The values at their places in an array of another shape: cut where it is smaller, zero where it is larger. */
    private fun fitted(
        from: NumberArray,
        shape: LongArray,
        type: String,
    ): NumberArray {
        val values = from.values()
        val made = DoubleArray(shape.fold(1L) { all, size -> all * size }.toInt())
        for (place in made.indices) {
            var rest = place.toLong()
            var there = 0L
            var step = 1L
            var inside = true
            for (axis in shape.indices.reversed()) {
                val index = rest % shape[axis]
                rest /= shape[axis]
                inside = inside && index < from.shape[axis]
                there += index * step
                step *= from.shape[axis]
            }
            if (inside) made[place] = values[there.toInt()]
        }
        return NumberArray.of(type, shape, made)
    }

    private fun nameOf(type: DataType): String =
        when (type) {
            DataType.FLOAT32 -> "float32"
            DataType.INT64 -> "int64"
            DataType.INT32 -> "int32"
            DataType.UINT8 -> "uint8"
            DataType.INT8 -> "int8"
            DataType.BOOL -> "bool"
            else -> throw RefusalException("tensors of type $type are not handled here")
        }

    override fun close() {
        interpreter.close()
    }
}
