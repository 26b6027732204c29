// The data files beside this program: settings, vocabulary, stored samples. See README.md.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace sample {

// Something the user can mend; printed without a stack.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Line = std::vector<std::string>;

// Tab-separated lines of a file, unescaped.
std::vector<Line> ReadLines(const std::string& path);

struct Port {
  std::string name, type;
  std::vector<int64_t> shape;  // -1: any size
};

// An array as it lies in memory. type is NumPy's name of it, or "text".
struct Array {
  std::string type;
  std::vector<int64_t> shape;
  std::string bytes;

  int64_t Count() const;
  std::vector<double> Values() const;  // any numeric type
};

using Arrays = std::map<std::string, Array>;

// Array of another type, from numbers.
Array Make(const std::string& type, const std::vector<int64_t>& shape, const std::vector<double>& values);

// Bytes of one element; refuses an unknown type.
size_t Width(const std::string& type);

struct Sample {
  Arrays input, output;
  std::vector<Array> raw;
};

struct Settings {
  std::map<std::string, Line> one;               // keys that stand there once
  std::map<std::string, std::vector<Line>> all;  // every line of a key

  const std::string& Text(const std::string& key) const;
  const Line& Fields(const std::string& key) const;
  int64_t Number(const std::string& key) const;
  std::vector<Port> Ports(const std::string& key) const;
  std::vector<std::string> Labels() const;
};

Settings ReadSettings(const std::string& folder);
std::vector<Sample> ReadSamples(const std::string& folder);
std::vector<int64_t> Integers(const std::string& text, char separator);

}  // namespace sample
