// side.h - a gear_side that comes from the caller.
#pragma once

#include "common/error.h"

#include <cstring>

namespace gear {

// Looked at as a number: C callers can pass any, and an enum of C++ must not hold it.
inline gear_side checked_side(const gear_side & side) {
    int number;
    static_assert(sizeof number == sizeof side, "gear_side is passed as an int");
    memcpy(&number, &side, sizeof number);
    if (number != GEAR_SIDE_K && number != GEAR_SIDE_V) {
        fail(GEAR_ERROR_INVALID, "side %d: use GEAR_SIDE_K (0) or GEAR_SIDE_V (1)", number);
    }
    return number == GEAR_SIDE_K ? GEAR_SIDE_K : GEAR_SIDE_V;
}

} // namespace gear
