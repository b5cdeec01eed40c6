// error.h - how failures travel: thrown as gear::error inside the library, turned into a gear_status and gear_last_error() at the C interface. Where
// nothing may be thrown they are kept as a kept_error until somebody asks.
#pragma once

#include "gearcpp.h"

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace gear {

struct error : std::runtime_error {
    error(gear_status status, const std::string & message) : std::runtime_error(message), status(status) {}
    gear_status status;
};

// A failure that waits to be asked for. Its size is fixed, because most of all a lack of memory must be keepable.
struct kept_error {
    gear_status status     = GEAR_OK;
    char        text[1024] = "";
    void        keep(gear_status status, const char * message) noexcept; // cut off where it is too long
};

// printf-style.
[[noreturn]] void fail(gear_status status, const char * format, ...) __attribute__((format(printf, 2, 3)));

// Set what gear_last_error() and gear_last_status() return on this thread.
void set_last_error(const char * message, gear_status status = GEAR_ERROR_INTERNAL) noexcept;

// Run f at the C boundary: no exception leaves, each becomes a status with its message.
template <class F> gear_status guarded(F && f) noexcept {
    try {
        f();
        return GEAR_OK;
    } catch (const error & e) {
        set_last_error(e.what(), e.status);
        return e.status;
    } catch (const std::bad_alloc &) {
        set_last_error("not enough memory", GEAR_ERROR_MEMORY);
        return GEAR_ERROR_MEMORY;
    } catch (const std::exception & e) {
        set_last_error(e.what());
        return GEAR_ERROR_INTERNAL;
    }
}

} // namespace gear
