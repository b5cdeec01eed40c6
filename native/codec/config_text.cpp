#include "codec/config_text.h"

#include "codec/basis.h"
#include "codec/codec.h"
#include "common/error.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>

namespace gear {

namespace {

struct field {
    const char * name;
    int32_t *    whole; // one of the two is set
    float *      real;
    int32_t *    also = nullptr; // a second member of the same name: settings that K and V share
};

void set_field(gear_config & c, const std::string & name, const std::string & value) {
    const field fields[] = {
        { "bits_k", &c.k.bits, nullptr },
        { "bits_v", &c.v.bits, nullptr },
        { "group_k", &c.k.group, nullptr },
        { "group_v", &c.v.group, nullptr },
        { "scale_bits", &c.k.scale_bits, nullptr, &c.v.scale_bits },
        { "rank_k", &c.k.rank, nullptr },
        { "rank_v", &c.v.rank, nullptr },
        { "factor_bits", &c.k.factor_bits, nullptr, &c.v.factor_bits },
        { "rounds", &c.k.rounds, nullptr, &c.v.rounds },
        { "rotate_k", &c.k.rotate, nullptr },
        { "rotate_v", &c.v.rotate, nullptr },
        { "center_k", &c.k.center, nullptr },
        { "center_v", &c.v.center, nullptr },
        { "clip_k", nullptr, &c.k.clip },
        { "clip_v", nullptr, &c.v.clip },
        { "feedback_k", &c.k.feedback, nullptr },
        { "sparsity", nullptr, &c.k.sparsity },
        { "tile", &c.tile, nullptr },
        { "n_tail", &c.n_tail, nullptr },
        { "n_sink", &c.n_sink, nullptr },
    };
    char *       end       = nullptr;
    const double number    = strtod(value.c_str(), &end);
    const bool   is_number = end != value.c_str() && *end == '\0';
    const bool   is_whole  = is_number && std::fabs(number) < INT32_MAX && number == (int32_t) number;
    if (name == "seed") {
        if (!is_number || !(number >= 0 && number <= UINT32_MAX)) {
            fail(GEAR_ERROR_INVALID, "GEARCPP_KV: seed=%s is not a number from 0 to %u", value.c_str(), UINT32_MAX);
        }
        c.seed = (uint32_t) number;
        return;
    }
    for (const field & f : fields) {
        if (name != f.name) {
            continue;
        }
        if (value == "auto" && (name.rfind("rotate", 0) == 0 || name == "feedback_k")) { // as GearConfig says it
            *f.whole = name == "feedback_k" ? feedback_auto : rotate_weighted;
            return;
        }
        if (!(f.whole ? is_whole : is_number)) {
            fail(GEAR_ERROR_INVALID, "GEARCPP_KV: %s=%s is not a %snumber", name.c_str(), value.c_str(), f.whole ? "whole " : "");
        }
        if (f.real) {
            *f.real      = (float) number;
            c.v.sparsity = c.k.sparsity;
        } else {
            *f.whole = (int32_t) number;
            if (f.also) {
                *f.also = *f.whole;
            }
        }
        return;
    }
    fail(GEAR_ERROR_INVALID, "GEARCPP_KV: unknown setting '%s'; settings are GearConfig's fields, as in bits_k=3,bits_v=3", name.c_str());
}

// Of a layer, counted from 0: how many there are is not known yet.
int layer_number(const std::string & text) {
    char *     end    = nullptr;
    const long number = strtol(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || number < 0 || number > INT16_MAX) {
        fail(GEAR_ERROR_INVALID, "GEARCPP_KV: '%s' is not the number of a layer, counted from 0, as in 0.bits_k=6", text.c_str());
    }
    return (int) number;
}

} // namespace

text_config config_from_text(const char * text) {
    text_config                                                     made = { gear_config_default(), {} };
    std::map<int, std::vector<std::pair<std::string, std::string>>> by_layer; // applied when all that layers share is known
    std::string                                                     rest = text ? text : "";
    while (!rest.empty()) {
        const size_t      comma = std::min(rest.find(','), rest.size());
        const std::string part  = rest.substr(0, comma);
        const size_t      equal = part.find('=');
        if (equal == std::string::npos) {
            fail(GEAR_ERROR_INVALID, "GEARCPP_KV: '%s' has no '='; write settings as bits_k=3,bits_v=3", part.c_str());
        }
        const std::string name = part.substr(0, equal), value = part.substr(equal + 1);
        const size_t      point = name.find('.');
        if (point == std::string::npos) {
            set_field(made.config, name, value);
        } else {
            by_layer[layer_number(name.substr(0, point))].emplace_back(name.substr(point + 1), value);
        }
        rest.erase(0, comma + 1);
    }
    check_config(made.config);
    for (const auto & [il, settings] : by_layer) {
        gear_config c = made.config;
        for (const auto & [name, value] : settings) {
            set_field(c, name, value);
        }
        made.exceptions.push_back({ il, c });
    }
    return made;
}

} // namespace gear
