#include "common/error.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace gear {

static thread_local kept_error last;

void kept_error::keep(gear_status kind, const char * message) noexcept {
    status = kind;
    if (message != text) {
        strncpy(text, message, sizeof text - 1); // the last byte stays 0
    }
}

void fail(gear_status status, const char * format, ...) {
    char    text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    throw error(status, text);
}

void set_last_error(const char * message, gear_status status) noexcept {
    last.keep(status, message);
}

} // namespace gear

extern "C" const char * gear_last_error(void) {
    return gear::last.text;
}

extern "C" gear_status gear_last_status(void) {
    return gear::last.status;
}

extern "C" const char * gear_version(void) {
    return GEARCPP_VERSION;
}
