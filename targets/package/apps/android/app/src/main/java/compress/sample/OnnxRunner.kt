package compress.sample

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** ONNX Runtime on the CPU, with the threads and graph level under which the package's figures were taken. */
class OnnxRunner(
    source: Source,
    settings: Settings,
) : ModelRunner {
    private val environment = OrtEnvironment.getEnvironment()
    private val session: OrtSession

    init {
        val runtime = settings.fields("runtime") // name, threads, graph level, arena
        OrtSession.SessionOptions().use { options ->
            options.setIntraOpNumThreads(runtime[1].toInt())
            options.setInterOpNumThreads(1)
            options.setOptimizationLevel(level(runtime[2]))
            options.setCPUArenaAllocator(runtime[3] == "1")
            session = environment.createSession(readAll(source, settings.text("model")), options)
        }
    }

    override fun run(inputs: Map<String, NumberArray>): Map<String, NumberArray> {
        val tensors = inputs.filterKeys { it in session.inputNames }.mapValues { tensor(it.value) }
        try {
            session.run(tensors).use { found -> return found.associate { it.key to array(it.value as OnnxTensor) } }
        } finally {
            tensors.values.forEach { it.close() }
        }
    }

    private fun tensor(array: NumberArray): OnnxTensor =
        OnnxTensor.createTensor(environment, array.buffer(), array.shape, javaType(array.type))

    private fun array(tensor: OnnxTensor): NumberArray {
        val type = TYPES.entries.first { it.value == tensor.info.type }.key
        val from: ByteBuffer = tensor.byteBuffer.order(ByteOrder.nativeOrder())
        val bytes = ByteArray(from.remaining())
        from.get(bytes)
        return NumberArray(type, tensor.info.shape, bytes)
    }

    override fun close() {
        session.close()
    }

    private fun javaType(name: String): OnnxJavaType = TYPES[name] ?: throw RefusalException("tensors of type $name are not handled here")

    private fun level(name: String): OrtSession.SessionOptions.OptLevel =
        when (name) {
            "disabled" -> OrtSession.SessionOptions.OptLevel.NO_OPT
            "basic" -> OrtSession.SessionOptions.OptLevel.BASIC_OPT
            "extended" -> OrtSession.SessionOptions.OptLevel.EXTENDED_OPT
            else -> OrtSession.SessionOptions.OptLevel.ALL_OPT
        }

    private companion object {
        val TYPES =
            mapOf(
                "float32" to OnnxJavaType.FLOAT,
                "float64" to OnnxJavaType.DOUBLE,
                "float16" to OnnxJavaType.FLOAT16,
                "int64" to OnnxJavaType.INT64,
                "int32" to OnnxJavaType.INT32,
                "uint8" to OnnxJavaType.UINT8,
                "int8" to OnnxJavaType.INT8,
                "bool" to OnnxJavaType.BOOL,
            )
    }
}
