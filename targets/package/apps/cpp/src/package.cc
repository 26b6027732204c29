#include "package.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

namespace sample {
namespace {

std::string Unescaped(const std::string& text) {
  std::string out;
  for (size_t at = 0; at < text.size(); ++at) {
    if (text[at] != '\\' || at + 1 == text.size()) {
      out += text[at];
      continue;
    }
    const char code = text[++at];
    out += code == 't' ? '\t' : code == 'n' ? '\n' : code == 'r' ? '\r' : code;
  }
  return out;
}

std::string ReadAll(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw Refusal(path + ": cannot be read");
  std::ostringstream content;
  content << stream.rdbuf();
  return content.str();
}

// IEEE 754 half precision.
double HalfValue(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double value = exponent == 0    ? std::ldexp(fraction, -24)
                 : exponent == 31 ? (fraction ? NAN : INFINITY)
                                  : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -value : value;
}

template <typename T>
std::vector<double> Read(const std::string& bytes) {
  std::vector<double> values(bytes.size() / sizeof(T));
  for (size_t place = 0; place < values.size(); ++place) {
    T item;
    std::memcpy(&item, bytes.data() + place * sizeof(T), sizeof(T));
    values[place] = static_cast<double>(item);
  }
  return values;
}

template <typename T>
std::string Write(const std::vector<double>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  for (size_t place = 0; place < values.size(); ++place) {
    const T item = static_cast<T>(values[place]);
    std::memcpy(&bytes[place * sizeof(T)], &item, sizeof(T));
  }
  return bytes;
}

std::vector<double> Halves(const std::string& bytes) {
  std::vector<double> values = Read<uint16_t>(bytes);
  for (double& value : values) value = HalfValue(static_cast<uint16_t>(value));
  return values;
}

}  // namespace

std::vector<Line> ReadLines(const std::string& path) {
  std::istringstream stream(ReadAll(path));
  std::vector<Line> lines;
  for (std::string text; std::getline(stream, text);) {
    Line line;
    size_t start = 0;
    for (size_t end; (end = text.find('\t', start)) != std::string::npos; start = end + 1) {
      line.push_back(Unescaped(text.substr(start, end - start)));
    }
    line.push_back(Unescaped(text.substr(start)));
    lines.push_back(line);
  }
  return lines;
}

std::vector<int64_t> Integers(const std::string& text, char separator) {
  std::vector<int64_t> found;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    size_t used = 0;
    try {
      found.push_back(std::stoll(part, &used));
    } catch (const std::exception&) {
      used = std::string::npos;
    }
    if (used != part.size()) throw Refusal("`" + part + "` is not a whole number");
  }
  return found;
}

int64_t Array::Count() const {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

size_t Width(const std::string& type) {
  static const std::map<std::string, size_t> known = {{"float32", 4}, {"float64", 8}, {"float16", 2}, {"int64", 8},
                                                      {"int32", 4},   {"uint8", 1},   {"int8", 1},    {"bool", 1}};
  const auto found = known.find(type);
  if (found == known.end()) throw Refusal("arrays of type " + type + " are not read by this program");
  return found->second;
}

std::vector<double> Array::Values() const {
  if (type == "float32") return Read<float>(bytes);
  if (type == "float64") return Read<double>(bytes);
  if (type == "float16") return Halves(bytes);
  if (type == "int64") return Read<int64_t>(bytes);
  if (type == "int32") return Read<int32_t>(bytes);
  if (type == "int8") return Read<int8_t>(bytes);
  Width(type);
  return Read<uint8_t>(bytes);
}

Array Make(const std::string& type, const std::vector<int64_t>& shape, const std::vector<double>& values) {
  if (type == "float32") return {type, shape, Write<float>(values)};
  if (type == "float64") return {type, shape, Write<double>(values)};
  if (type == "int64") return {type, shape, Write<int64_t>(values)};
  if (type == "int32") return {type, shape, Write<int32_t>(values)};
  if (type == "uint8" || type == "bool") return {type, shape, Write<uint8_t>(values)};
  if (type == "int8") return {type, shape, Write<int8_t>(values)};
  throw Refusal("arrays of type " + type + " are not made by this program");
}

const Line& Settings::Fields(const std::string& key) const {
  const auto found = one.find(key);
  if (found == one.end()) throw Refusal("settings.tsv has no `" + key + "`");
  return found->second;
}

const std::string& Settings::Text(const std::string& key) const {
  const Line& fields = Fields(key);
  if (fields.empty()) throw Refusal("settings.tsv has no value of `" + key + "`");
  return fields[0];
}

int64_t Settings::Number(const std::string& key) const { return Integers(Text(key), ' ').at(0); }

std::vector<Port> Settings::Ports(const std::string& key) const {
  std::vector<Port> ports;
  const auto found = all.find(key);
  if (found == all.end()) return ports;
  for (const Line& line : found->second) ports.push_back({line.at(0), line.at(1), Integers(line.at(2), ',')});
  return ports;
}

std::vector<std::string> Settings::Labels() const {
  std::vector<std::string> labels;
  const auto found = all.find("label");
  if (found != all.end()) {
    for (const Line& line : found->second) labels.push_back(line.at(0));
  }
  return labels;
}

Settings ReadSettings(const std::string& folder) {
  Settings settings;
  for (Line line : ReadLines(folder + "/settings.tsv")) {
    const std::string key = line.at(0);
    line.erase(line.begin());
    settings.one[key] = line;
    settings.all[key].push_back(line);
  }
  return settings;
}

std::vector<Sample> ReadSamples(const std::string& folder) {
  const std::string bytes = ReadAll(folder + "/samples.bin");
  std::vector<Sample> samples;
  for (const Line& line : ReadLines(folder + "/samples.tsv")) {
    const size_t index = std::stoul(line.at(0)), offset = std::stoul(line.at(5)), size = std::stoul(line.at(6));
    if (index > samples.size() || offset > bytes.size() || size > bytes.size() - offset) {
      throw Refusal("samples.tsv does not fit samples.bin");
    }
    if (index == samples.size()) samples.emplace_back();
    const Array array{line.at(3), Integers(line.at(4), ','), bytes.substr(offset, size)};
    Sample& sample = samples[index];
    if (line.at(1) == "raw") sample.raw.push_back(array);
    if (line.at(1) == "input") sample.input[line.at(2)] = array;
    if (line.at(1) == "output") sample.output[line.at(2)] = array;
  }
  return samples;
}

}  // namespace sample
