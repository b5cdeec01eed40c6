// config_text.h - a configuration as text, for programs that cannot pass another one (GEARCPP_KV): "bits_k=3,bits_v=3,group_k=32", GearConfig's names.
#pragma once

#include "gearcpp.h"

namespace gear {

// The default with what the text changes in it. nullptr and "": the default. Throws gear::error (GEAR_ERROR_INVALID).
gear_config config_from_text(const char * text);

} // namespace gear
