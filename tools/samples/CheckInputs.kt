package compress.sample

import java.io.File
import java.security.MessageDigest

/** The Android sample's pre-processing on this machine: a digest per input that a job (a line) makes. No model runs. */
fun main(words: Array<String>) {
    val data = File(words[0])
    val jobs = File(words[1])
    val model = PackagedModel({ name -> File(data, name).inputStream() }, { _, _ -> Silent })
    for ((index, sample) in model.stored().withIndex()) model.inputProblems(index, sample).forEach(::println)
    for (job in readLines({ jobs.inputStream() }, jobs.name)) {
        val inputs =
            if (job[0] == "text") {
                model.textInputs(job.drop(1))
            } else {
                val size = job.subList(1, 4).map { it.toInt() }
                model.pictureInputs(Picture(size[0], size[1], size[2], File(job[4]).readBytes()))
            }
        println(inputs.toSortedMap().map { (name, array) -> "$name=${digest(array.bytes)}" }.joinToString("\t"))
    }
}

private object Silent : ModelRunner {
    override fun run(inputs: Map<String, NumberArray>): Map<String, NumberArray> = throw RefusalException("no runtime is here")

    override fun close() = Unit
}

private fun digest(bytes: ByteArray): String = MessageDigest.getInstance("SHA-256").digest(bytes).joinToString("") { "%02x".format(it) }
