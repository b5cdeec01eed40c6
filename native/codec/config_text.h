// config_text.h - a configuration as text, for programs that cannot pass another one (GEARCPP_KV): "bits_k=3,bits_v=3,group_k=32", GearConfig's names;
// with the number of a layer and a point in front, "0.bits_k=6", a setting is of that layer alone.
#pragma once

#include "gearcpp.h"

#include <vector>

namespace gear {

struct text_config {
    gear_config                    config;
    std::vector<gear_layer_config> exceptions;
};

// The default with what the text changes in it. nullptr and "": the default. Throws gear::error (GEAR_ERROR_INVALID).
text_config config_from_text(const char * text);

} // namespace gear
