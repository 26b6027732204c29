// Pictures as the model's input: the arithmetic of the package's infer.py, bit for bit.
#pragma once

#include <string>

#include "package.h"

namespace sample {

// 8-bit pixels, rows of (height, width, channels); 1 or 3 channels.
struct Picture {
  int64_t height = 0, width = 0, channels = 0;
  std::vector<uint8_t> pixels;
};

// Binary PGM or PPM with 8 bits a sample. Put the decoder of your platform here for other formats.
Picture ReadPicture(const std::string& path);

// A stored (height, width) or (height, width, channels) array of uint8.
Picture PictureOf(const Array& array);

// Channels, size, (pixel * scale - mean) / std, layout; with a batch axis.
Array PictureInput(Picture picture, const Settings& settings);

}  // namespace sample
