#include "text.h"

#include <algorithm>

namespace sample {
namespace {

char32_t Hex(const std::string& text) { return static_cast<char32_t>(std::stoul(text, nullptr, 16)); }

}  // namespace

Codes Decode(const std::string& utf8) {
  Codes codes;
  for (size_t at = 0; at < utf8.size();) {
    const auto lead = static_cast<unsigned char>(utf8[at]);
    const size_t size = lead < 0x80 ? 1 : lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC2 ? 2 : 0;
    char32_t code = size == 1 ? lead : lead & (0x7F >> size);
    bool good = size != 0 && at + size <= utf8.size();
    for (size_t place = 1; good && place < size; ++place) {
      const auto next = static_cast<unsigned char>(utf8[at + place]);
      good = (next & 0xC0) == 0x80;
      code = (code << 6) | (next & 0x3F);
    }
    codes += good ? code : U'\uFFFD';
    at += good ? size : 1;
  }
  return codes;
}

Tokenizer::Tokenizer(const std::string& folder, const Settings& settings)
    : settings_(settings),
      prefix_(Decode(settings.Text("prefix"))),
      unknown_(settings.Number("unknown")),
      longest_word_(settings.Number("longest_word")),
      longest_(settings.Number("max_length")) {
  for (const Line& line : ReadLines(folder + "/vocabulary.tsv")) vocabulary_[Decode(line.at(1))] = std::stoll(line[0]);
  for (const Line& line : ReadLines(folder + "/characters.tsv")) {
    const std::string& kind = line.at(0);
    if (kind == "hangul") {
      hangul_ = true;
    } else if (kind == "to") {
      Codes& made = changed_[Hex(line.at(1))];
      size_t start = 0;
      for (size_t end = 0; !line.at(2).empty() && end != std::string::npos; start = end + 1) {
        end = line[2].find(' ', start);
        made += Hex(line[2].substr(start, end == std::string::npos ? end : end - start));
      }
    } else {
      const Kind found = kind == "drop" ? kDrop : kind == "wide" ? kWide : kind == "space" ? kSpace : kPunctuation;
      (found == kDrop || found == kWide ? cleaning_ : splitting_).push_back({Hex(line.at(1)), Hex(line.at(2)), found});
    }
  }
  const auto order = [](const Range& one, const Range& other) { return one.first < other.first; };
  std::sort(cleaning_.begin(), cleaning_.end(), order);
  std::sort(splitting_.begin(), splitting_.end(), order);
  const auto special = settings.all.find("special");
  if (special == settings.all.end()) return;
  for (const Line& line : special->second) {
    special_.push_back({std::stoll(line.at(0)), Decode(line.at(1)), line.at(2) == "1", line.at(3) == "1"});
  }
}

Tokenizer::Kind Tokenizer::KindOf(char32_t code, bool splitting) const {
  const std::vector<Range>& ranges = splitting ? splitting_ : cleaning_;
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), code,
                                      [](char32_t wanted, const Range& range) { return wanted < range.first; });
  return after != ranges.begin() && code <= std::prev(after)->last ? std::prev(after)->kind : kPlain;
}

void Tokenizer::AddNormal(char32_t code, Codes& out) const {
  if (hangul_ && code >= 0xAC00 && code <= 0xD7A3) {  // Unicode Standard, section 3.12
    const char32_t index = code - 0xAC00;
    out += 0x1100 + index / 588;
    out += 0x1161 + index % 588 / 28;
    if (index % 28) out += 0x11A7 + index % 28;
    return;
  }
  const auto found = changed_.find(code);
  if (found == changed_.end()) {
    out += code;
  } else {
    out += found->second;
  }
}

Codes Tokenizer::Normalize(const Codes& text) const {
  Codes out;
  for (char32_t code : text) {
    const Kind kind = KindOf(code, false);
    if (kind == kDrop) continue;
    if (kind == kWide) out += U' ';
    AddNormal(code, out);
    if (kind == kWide) out += U' ';
  }
  return out;
}

void Tokenizer::AddWords(const Codes& text, Ids& ids) const {
  Codes word;
  for (char32_t code : Normalize(text)) {
    const Kind kind = KindOf(code, true);
    if (kind == kPlain) {
      word += code;
      continue;
    }
    if (!word.empty()) AddPieces(word, ids);
    word.clear();
    if (kind == kPunctuation) AddPieces(Codes(1, code), ids);
  }
  if (!word.empty()) AddPieces(word, ids);
}

void Tokenizer::AddPieces(const Codes& word, Ids& ids) const {
  Ids found;
  size_t start = 0;
  while (start < word.size() && static_cast<int64_t>(word.size()) <= longest_word_) {
    size_t end = word.size();
    auto piece = vocabulary_.end();
    for (; end > start && piece == vocabulary_.end(); --end) {
      piece = vocabulary_.find((start ? prefix_ : Codes()) + word.substr(start, end - start));
    }
    if (piece == vocabulary_.end()) {
      ids.push_back(unknown_);
      return;
    }
    found.push_back(piece->second);
    start = end + 1;
  }
  if (found.empty()) found.push_back(unknown_);
  ids.insert(ids.end(), found.begin(), found.end());
}

Ids Tokenizer::AllIds(const Codes& text, size_t enough) const {
  Ids ids;
  size_t start = 0, at = 0;
  while (at < text.size() && ids.size() < enough) {
    const auto found = std::find_if(special_.begin(), special_.end(), [&](const Special& special) {
      return text.compare(at, special.text.size(), special.text) == 0;
    });
    if (found == special_.end()) {
      ++at;
      continue;
    }
    size_t before = at;
    while (found->left && before > start && KindOf(text[before - 1], true) == kSpace) --before;
    AddWords(text.substr(start, before - start), ids);
    if (ids.size() < enough) ids.push_back(found->id);
    at += found->text.size();
    while (found->right && at < text.size() && KindOf(text[at], true) == kSpace) ++at;
    start = at;
  }
  if (ids.size() < enough) AddWords(text.substr(start), ids);
  return ids;
}

std::pair<Ids, Ids> Tokenizer::Encode(const std::string& text) const {
  Ids ids;
  for (const std::string& id : settings_.Fields("before")) ids.push_back(std::stoll(id));
  const size_t after = settings_.Fields("after").size();
  const size_t room = std::max<int64_t>(0, longest_ - static_cast<int64_t>(ids.size() + after));
  const Ids found = AllIds(Decode(text), room);
  ids.insert(ids.end(), found.begin(), found.begin() + static_cast<int64_t>(std::min(room, found.size())));
  for (const std::string& id : settings_.Fields("after")) ids.push_back(std::stoll(id));
  return {ids, Ids(ids.size(), 0)};
}

std::pair<Ids, Ids> Tokenizer::EncodePair(const std::string& first, const std::string& second) const {
  const std::vector<Line>& layout = settings_.all.at("pair_part");
  Ids sides[2] = {AllIds(Decode(first), SIZE_MAX), AllIds(Decode(second), SIZE_MAX)};
  int64_t room = longest_;
  for (const Line& part : layout) room -= part.at(1) == "first" || part[1] == "second" ? 0 : part.size() - 1;
  room = std::max<int64_t>(0, room);
  Ids& brief = sides[0].size() <= sides[1].size() ? sides[0] : sides[1];
  Ids& lengthy = &brief == &sides[0] ? sides[1] : sides[0];
  int64_t low = static_cast<int64_t>(brief.size()), high = static_cast<int64_t>(lengthy.size());
  if (low + high > room) high = low > room ? low : std::max(low, room - low);
  if (low + high > room) {
    low = room / 2;
    high = room / 2 + room % 2;
  }
  brief.resize(low);
  lengthy.resize(high);
  Ids ids, types;
  for (const Line& part : layout) {
    Ids found;
    if (part[1] == "first" || part[1] == "second") {
      found = sides[part[1] == "second"];
    } else {
      for (size_t place = 1; place < part.size(); ++place) found.push_back(std::stoll(part[place]));
    }
    ids.insert(ids.end(), found.begin(), found.end());
    types.insert(types.end(), found.size(), std::stoll(part[0]));
  }
  return {ids, types};
}

Arrays TextInput(const Ids& ids, const Ids& types, const Settings& settings) {
  Arrays made;
  for (const Port& port : settings.Ports("input")) {
    const Line& names = settings.Fields("names");
    if (std::find(names.begin(), names.end(), port.name) == names.end()) continue;
    const bool mask = port.name.find("mask") != std::string::npos;
    const bool kind = !mask && (port.name.find("type") != std::string::npos || port.name.find("segment") != std::string::npos);
    const int64_t size = port.shape.size() == 2 && port.shape[1] > 0 ? port.shape[1] : static_cast<int64_t>(ids.size());
    std::vector<double> values(size, mask || kind ? 0.0 : static_cast<double>(settings.Number("pad_id")));
    for (int64_t place = 0; place < std::min<int64_t>(size, static_cast<int64_t>(ids.size())); ++place) {
      values[place] = mask ? 1.0 : static_cast<double>(kind ? types[place] : ids[place]);
    }
    made[port.name] = Make(port.type, {1, size}, values);
  }
  return made;
}

}  // namespace sample
