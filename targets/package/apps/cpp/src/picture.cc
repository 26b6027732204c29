#include "picture.h"

#include <algorithm>
#include <cmath>
#include <fstream>

namespace sample {
namespace {

constexpr int kBits = 32 - 8 - 2;  // fractional bits of a filter's weights

// Grey is repeated, colour becomes ITU-R 601 luma in fixed point.
Picture ToChannels(const Picture& from, int64_t channels) {
  if (from.channels == channels || (channels != 1 && channels != 3)) return from;
  Picture made{from.height, from.width, channels, {}};
  made.pixels.reserve(made.height * made.width * channels);
  for (int64_t place = 0; place < from.height * from.width; ++place) {
    if (channels == 3) {
      made.pixels.insert(made.pixels.end(), 3, from.pixels[place]);
      continue;
    }
    const uint8_t* pixel = &from.pixels[place * 3];
    made.pixels.push_back((int64_t{19595} * pixel[0] + int64_t{38470} * pixel[1] + int64_t{7471} * pixel[2] + 0x8000) >> 16);
  }
  return made;
}

// Source index of every pixel; the sum runs up as Pillow's does.
std::vector<int64_t> Nearest(int64_t old_size, int64_t new_size) {
  const double scale = static_cast<double>(old_size) / static_cast<double>(new_size);
  std::vector<int64_t> places(new_size);
  double at = scale * 0.5;
  for (int64_t& place : places) {
    place = std::min(static_cast<int64_t>(at), old_size - 1);
    at += scale;
  }
  return places;
}

// Keys (1981), a = -0.5, for bicubic; a triangle for bilinear.
double Kernel(double x, bool cubic) {
  x = std::fabs(x);
  if (!cubic) return std::max(0.0, 1.0 - x);
  if (x < 1) return ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

struct Window {
  int64_t first;
  std::vector<int64_t> weights;
};

// Weights of a filter that widens when the picture shrinks.
std::vector<Window> Windows(int64_t old_size, int64_t new_size, bool cubic) {
  const double scale = static_cast<double>(old_size) / static_cast<double>(new_size), stretch = std::max(scale, 1.0);
  const double support = (cubic ? 2.0 : 1.0) * stretch;
  std::vector<Window> windows;
  for (int64_t at = 0; at < new_size; ++at) {
    const double centre = (static_cast<double>(at) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
    const int64_t last = std::min(static_cast<int64_t>(centre + support + 0.5), old_size);
    std::vector<double> weights;
    double sum = 0;
    for (int64_t place = first; place < last; ++place) {
      weights.push_back(Kernel((static_cast<double>(place) - centre + 0.5) * (1.0 / stretch), cubic));
      sum += weights.back();
    }
    Window window{first, {}};
    for (double weight : weights) {
      weight /= sum;
      window.weights.push_back(static_cast<int64_t>(std::trunc(weight * (1 << kBits) + (weight < 0 ? -0.5 : 0.5))));
    }
    windows.push_back(window);
  }
  return windows;
}

// Resample rows (of `step` values each, or of single columns seen as rows) to `size` places.
Picture Convolve(const Picture& from, int64_t size, bool cubic, bool columns) {
  const std::vector<Window> windows = Windows(columns ? from.width : from.height, size, cubic);
  Picture made{columns ? from.height : size, columns ? size : from.width, from.channels, {}};
  made.pixels.resize(made.height * made.width * made.channels);
  const int64_t row = from.width * from.channels, step = columns ? from.channels : row;
  for (int64_t y = 0; y < made.height; ++y) {
    for (int64_t x = 0; x < made.width; ++x) {
      const Window& window = windows[columns ? x : y];
      const int64_t start = columns ? y * row + window.first * step : window.first * step + x * from.channels;
      for (int64_t channel = 0; channel < made.channels; ++channel) {
        int64_t total = int64_t{1} << (kBits - 1);
        for (size_t place = 0; place < window.weights.size(); ++place) {
          total += window.weights[place] * from.pixels[start + static_cast<int64_t>(place) * step + channel];
        }
        made.pixels[(y * made.width + x) * made.channels + channel] =
            static_cast<uint8_t>(std::clamp<int64_t>(total >> kBits, 0, 255));
      }
    }
  }
  return made;
}

Picture Resize(const Picture& from, int64_t height, int64_t width, const std::string& resample) {
  if (resample == "nearest") {
    const std::vector<int64_t> rows = Nearest(from.height, height), columns = Nearest(from.width, width);
    Picture made{height, width, from.channels, {}};
    for (int64_t row : rows) {
      for (int64_t column : columns) {
        const auto* pixel = &from.pixels[(row * from.width + column) * from.channels];
        made.pixels.insert(made.pixels.end(), pixel, pixel + from.channels);
      }
    }
    return made;
  }
  const bool cubic = resample == "bicubic";
  const Picture wide = from.width == width ? from : Convolve(from, width, cubic, true);
  return wide.height == height ? wide : Convolve(wide, height, cubic, false);
}

std::vector<float> Floats(const Line& fields) {
  std::vector<float> values;
  for (const std::string& field : fields) values.push_back(std::stof(field));
  return values;
}

}  // namespace

Picture ReadPicture(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw Refusal(path + ": no such file");
  char magic[2] = {};
  stream.read(magic, 2);
  const bool grey = magic[1] == '5';
  int64_t head[3] = {};  // width, height, largest sample
  for (int64_t& number : head) {
    std::string comment;
    while ((stream >> std::ws) && stream.peek() == '#') std::getline(stream, comment);
    stream >> number;
  }
  stream.get();
  const bool known = magic[0] == 'P' && (grey || magic[1] == '6') && head[2] == 255;
  if (!stream || !known || head[0] < 1 || head[1] < 1 || head[0] > (1 << 14) || head[1] > (1 << 14)) {
    throw Refusal(path + ": only binary PGM and PPM with 8 bits a sample are read");
  }
  Picture picture{head[1], head[0], grey ? 1 : 3, {}};
  picture.pixels.resize(picture.height * picture.width * picture.channels);
  stream.read(reinterpret_cast<char*>(picture.pixels.data()), static_cast<std::streamsize>(picture.pixels.size()));
  if (!stream) throw Refusal(path + ": the pixels end early");
  return picture;
}

Picture PictureOf(const Array& array) {
  if (array.type != "uint8" || array.shape.size() < 2 || array.shape.size() > 3) throw Refusal("not a picture");
  Picture picture{array.shape[0], array.shape[1], array.shape.size() == 3 ? array.shape[2] : 1, {}};
  picture.pixels.assign(array.bytes.begin(), array.bytes.end());
  return picture;
}

Array PictureInput(Picture picture, const Settings& settings) {
  picture = ToChannels(picture, settings.Number("channels"));
  const Line& size = settings.Fields("size");
  if (size.size() == 2) {
    picture = Resize(picture, std::stoll(size[0]), std::stoll(size[1]), settings.Text("resample"));
  }
  const Port port = settings.Ports("input").at(0);
  const std::vector<float> mean = Floats(settings.Fields("mean")), deviation = Floats(settings.Fields("std"));
  const float scale = std::stof(settings.Text("scale"));
  const bool planes = settings.Text("layout") == "NCHW", whole = port.type.rfind("float", 0) != 0;
  const int64_t channels = picture.channels, area = picture.height * picture.width;
  std::vector<double> values(area * channels);
  for (int64_t place = 0; place < area; ++place) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      const float pixel = static_cast<float>(picture.pixels[place * channels + channel]);
      float value = (pixel * scale - mean[channel % mean.size()]) / deviation[channel % deviation.size()];
      if (whole) value = std::clamp(std::nearbyint(value), 0.0f, 255.0f);
      values[planes ? channel * area + place : place * channels + channel] = value;
    }
  }
  const std::vector<int64_t> shape = planes ? std::vector<int64_t>{1, channels, picture.height, picture.width}
                                            : std::vector<int64_t>{1, picture.height, picture.width, channels};
  return Make(port.type, shape, values);
}

}  // namespace sample
