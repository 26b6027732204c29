// BERT's WordPiece tokenizer: Devlin et al. (2019). The same ids as the package's infer.py.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>

#include "package.h"

namespace sample {

using Ids = std::vector<int64_t>;
using Codes = std::u32string;  // one element a Unicode code point

class Tokenizer {
 public:
  Tokenizer(const std::string& folder, const Settings& settings);

  // Token and type ids of a text, cut to the model's length.
  std::pair<Ids, Ids> Encode(const std::string& text) const;

  // The same of two texts; the longer one is cut first.
  std::pair<Ids, Ids> EncodePair(const std::string& first, const std::string& second) const;

 private:
  enum Kind : uint8_t { kPlain, kDrop, kSpace, kPunctuation, kWide };
  struct Special {
    int64_t id;
    Codes text;
    bool left, right;  // takes blanks beside it
  };
  struct Range {
    char32_t first, last;
    Kind kind;
  };

  Kind KindOf(char32_t code, bool splitting) const;
  Codes Normalize(const Codes& text) const;
  void AddNormal(char32_t code, Codes& out) const;
  Ids AllIds(const Codes& text, size_t enough) const;
  void AddWords(const Codes& text, Ids& ids) const;
  void AddPieces(const Codes& word, Ids& ids) const;

  const Settings& settings_;
  std::unordered_map<std::u32string, int64_t> vocabulary_;
  std::unordered_map<char32_t, Codes> changed_;
  std::vector<Range> cleaning_, splitting_;  // sorted
  std::vector<Special> special_;             // the longest first
  Codes prefix_;
  int64_t unknown_, longest_word_, longest_;
  bool hangul_ = false;
};

Codes Decode(const std::string& utf8);

// Ids as the model's inputs, shape (1, tokens); padded only where the model's shape is fixed.
Arrays TextInput(const Ids& ids, const Ids& types, const Settings& settings);

}  // namespace sample
