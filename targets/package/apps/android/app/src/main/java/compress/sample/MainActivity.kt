package compress.sample

import android.app.Activity
import android.content.Intent
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.util.Locale
import java.util.concurrent.Executors

private const val PICK = 1

/** Repeats the stored answers, then answers a picture or a text. The model runs on a thread of its own. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private lateinit var said: TextView
    private lateinit var model: PackagedModel // of the worker's thread

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        said = TextView(this)
        val text = EditText(this)
        val button = Button(this)
        button.text = "Answer"
        val column = LinearLayout(this)
        column.orientation = LinearLayout.VERTICAL
        column.setPadding(32, 96, 32, 32)
        listOf(text, button, said).forEach(column::addView)
        val page = ScrollView(this)
        page.addView(column)
        setContentView(page)
        work {
            model = PackagedModel({ name -> assets.open(name) })
            "${model.name}\n${model.selfCheck()}"
        }
        button.setOnClickListener {
            val given = text.text.toString()
            if (given.isBlank()) pick() else work { lines(model.classify(given)) }
        }
    }

    private fun pick() {
        val intent = Intent(Intent.ACTION_GET_CONTENT)
        intent.type = "image/*"
        startActivityForResult(intent, PICK)
    }

    @Deprecated("the way to get results that needs no library")
    override fun onActivityResult(
        request: Int,
        result: Int,
        data: Intent?,
    ) {
        val address = data?.data ?: return
        work {
            val bitmap = contentResolver.openInputStream(address).use { BitmapFactory.decodeStream(it) }
            if (bitmap == null) "not a picture" else lines(model.classify(pictureOf(bitmap)))
        }
    }

    private fun pictureOf(bitmap: Bitmap): Picture {
        val colours = IntArray(bitmap.width * bitmap.height)
        bitmap.getPixels(colours, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
        val pixels = ByteArray(colours.size * 3) { (colours[it / 3] shr (16 - 8 * (it % 3))).toByte() }
        return Picture(bitmap.height, bitmap.width, 3, pixels)
    }

    private fun lines(scores: List<Pair<String, Double>>): String =
        scores.take(5).joinToString("\n") { String.format(Locale.ROOT, "%s  %.4f", it.first, it.second) }

    /** Runs [task] on the worker and shows what it says, also when it fails. */
    private fun work(task: () -> String) {
        worker.execute {
            val text = runCatching(task).getOrElse { it.message ?: it.toString() }
            runOnUiThread { said.text = text }
        }
    }

    override fun onDestroy() {
        worker.execute { if (::model.isInitialized) model.close() }
        worker.shutdown()
        super.onDestroy()
    }
}
