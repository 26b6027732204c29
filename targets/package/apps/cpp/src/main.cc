// Runs the packaged model. See README.md.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <memory>

#include "model.h"
#include "package.h"
#include "picture.h"
#include "text.h"

namespace {

using sample::Array;
using sample::Arrays;
using sample::Refusal;

struct Options {
  std::string data = "data";
  std::vector<std::string> inputs;
  bool check = false, benchmark = false;
  int threads = 0;
};

class Program {
 public:
  explicit Program(const Options& options)
      : settings_(sample::ReadSettings(options.data)),
        samples_(sample::ReadSamples(options.data)),
        model_(options.data, settings_, options.threads) {
    if (Kind() == "text" && settings_.Text("tokenizer") == "wordpiece") {
      tokenizer_ = std::make_unique<sample::Tokenizer>(options.data, settings_);
    }
  }

  // 0: every stored answer is repeated; 1: one is not.
  int Check() {
    double worst = 0;
    int problems = 0;
    const double tolerance = std::stod(settings_.Text("tolerance"));
    for (size_t index = 0; index < samples_.size(); ++index) {
      problems += CheckInput(index);
      const Arrays found = model_.Run(samples_[index].input);
      for (const auto& [name, wanted] : samples_[index].output) {
        const double difference = Difference(found.at(name), wanted);
        worst = std::max(worst, difference);
        if (difference <= tolerance) continue;
        std::printf("sample %zu, %s: differs by %.3g, accepted %g\n", index, name.c_str(), difference, tolerance);
        ++problems;
      }
    }
    std::printf("self-check %s: %zu samples, worst relative difference %.3g (accepted %g)\n",
                problems ? "FAILED" : "passed", samples_.size(), worst, tolerance);
    return problems ? 1 : 0;
  }

  void Answer(const std::string& given) {
    const Arrays outputs = model_.Run(InputOf(given));
    std::printf("%s\n ", given.c_str());
    const Array& first = outputs.begin()->second;
    const auto scores = sample::Scores(first, settings_);
    for (size_t place = 0; place < std::min<size_t>(5, scores.size()); ++place) {
      std::printf(" %s %.1f %% ", scores[place].first.c_str(), 100 * scores[place].second);
    }
    if (scores.empty()) {
      for (double value : first.Values()) std::printf(" %.6g", value);
    }
    std::printf("\n");
  }

  // p50 and p95 of single runs, after 20 for warming up.
  void Benchmark() {
    if (samples_.empty()) throw Refusal("this package has no stored sample to benchmark with");
    std::vector<double> times;
    for (int run = 0; run < 220; ++run) {
      const auto before = std::chrono::steady_clock::now();
      model_.Run(samples_[0].input);
      const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - before;
      if (run >= 20) times.push_back(took.count());
    }
    std::sort(times.begin(), times.end());
    std::printf("p50 %.3f ms, p95 %.3f ms, %zu runs\n", times[times.size() / 2], times[times.size() * 95 / 100], times.size());
  }

 private:
  std::string Kind() const { return settings_.Text("preprocess"); }

  Arrays InputOf(const std::string& given) const {
    if (Kind() == "text") return Tokens({given});
    if (Kind() != "image") throw Refusal("this program makes no inputs for this model: see InputOf in main.cc");
    return {{settings_.Ports("input").at(0).name, sample::PictureInput(sample::ReadPicture(given), settings_)}};
  }

  // A text, or two: beside each other or with a tab between them.
  Arrays Tokens(std::vector<std::string> texts) const {
    if (!tokenizer_) {
      const sample::Ids ids = sample::Integers(texts.at(0), ' ');
      return sample::TextInput(ids, sample::Ids(ids.size(), 0), settings_);
    }
    if (settings_.Number("pair") && texts.size() == 1) {
      const size_t tab = texts[0].find('\t');
      if (tab == std::string::npos) throw Refusal("this model takes two texts: put a tab between them");
      texts = {texts[0].substr(0, tab), texts[0].substr(tab + 1)};
    }
    const auto [ids, types] = texts.size() == 2 ? tokenizer_->EncodePair(texts[0], texts[1]) : tokenizer_->Encode(texts[0]);
    return sample::TextInput(ids, types, settings_);
  }

  // The sample before pre-processing, where it is stored, must become the stored input.
  int CheckInput(size_t index) const {
    const sample::Sample& stored = samples_[index];
    if (stored.raw.empty()) return 0;
    Arrays made;
    if (stored.raw[0].type == "text") {
      if (!tokenizer_) return 0;
      std::vector<std::string> texts;
      for (const Array& raw : stored.raw) texts.push_back(raw.bytes);
      made = Tokens(texts);
    } else if (Kind() == "image") {
      made[stored.input.begin()->first] = sample::PictureInput(sample::PictureOf(stored.raw[0]), settings_);
    }
    int problems = 0;
    for (const auto& [name, array] : made) {
      if (Difference(array, stored.input.at(name)) <= 1e-5) continue;
      std::printf("sample %zu, %s: pre-processing gives another input\n", index, name.c_str());
      ++problems;
    }
    return problems;
  }

  // Largest absolute difference over the largest magnitude that was wanted.
  static double Difference(const Array& found, const Array& wanted) {
    if (found.shape != wanted.shape) return INFINITY;
    const std::vector<double> have = found.Values(), want = wanted.Values();
    double scale = 1e-12, difference = 0;
    for (size_t place = 0; place < want.size(); ++place) {
      scale = std::max(scale, std::fabs(want[place]));
      difference = std::max(difference, std::fabs(have[place] - want[place]));
      if (std::isnan(have[place]) != std::isnan(want[place])) return INFINITY;
    }
    return difference / scale;
  }

  sample::Settings settings_;
  std::vector<sample::Sample> samples_;
  sample::Model model_;
  std::unique_ptr<sample::Tokenizer> tokenizer_;
};

Options Parse(int count, char** words) {
  Options options;
  for (int place = 1; place < count; ++place) {
    const std::string word = words[place];
    const bool valued = word == "--data" || word == "--threads";
    if (valued && place + 1 == count) throw Refusal(word + " needs a value");
    if (word == "--self-check") {
      options.check = true;
    } else if (word == "--benchmark") {
      options.benchmark = true;
    } else if (word == "--data") {
      options.data = words[++place];
    } else if (word == "--threads") {
      options.threads = static_cast<int>(sample::Integers(words[++place], ' ').at(0));
    } else {
      options.inputs.push_back(word);
    }
  }
  if (!options.check && !options.benchmark && options.inputs.empty()) {
    throw Refusal("give an input, --self-check or --benchmark; --data FOLDER and --threads N beside them");
  }
  return options;
}

}  // namespace

int main(int count, char** words) {
  try {
    const Options options = Parse(count, words);
    Program program(options);
    if (options.check && program.Check() != 0) return 1;
    if (options.benchmark) program.Benchmark();
    for (const std::string& given : options.inputs) program.Answer(given);
    return 0;
  } catch (const Refusal& refusal) {
    std::cerr << "error: " << refusal.what() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
  }
  return 2;
}
