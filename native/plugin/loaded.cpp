#include "plugin/loaded.h"

#include <dlfcn.h>
#include <utility>

#if defined(__APPLE__)
#    include <mach-o/dyld.h>
#else
#    include <link.h>
#endif

namespace gear {

namespace {

// Only what is loaded already: a file is never opened here. A path of no characters is the program itself.
loaded_library reopen(const std::string & path) {
    return { path, dlopen(path.empty() ? nullptr : path.c_str(), RTLD_LAZY | RTLD_NOLOAD) };
}

std::vector<std::string> loaded_paths() {
    std::vector<std::string> paths;
#if defined(__APPLE__)
    paths.emplace_back(); // dyld's first image, by its path, cannot be opened with dlopen
    for (uint32_t i = 1; i < _dyld_image_count(); ++i) {
        if (const char * name = _dyld_get_image_name(i)) {
            paths.emplace_back(name);
        }
    }
#else
    // The loader holds a lock while it walks: names now, dlopen afterwards.
    dl_iterate_phdr(
        [](dl_phdr_info * info, size_t, void * out) {
            static_cast<std::vector<std::string> *>(out)->emplace_back(info->dlpi_name ? info->dlpi_name : "");
            return 0;
        },
        &paths);
#endif
    return paths;
}

} // namespace

loaded_library::loaded_library(std::string path, void * handle)
    : path_(std::move(path)), handle_(handle, [](void * h) {
          if (h) {
              dlclose(h);
          }
      }) {}

void * loaded_library::symbol(const char * name) const {
    return handle_ ? dlsym(handle_.get(), name) : nullptr;
}

void loaded_library::pin() const {
    dlopen(path_.empty() ? nullptr : path_.c_str(), RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE); // the flag is the library's from now on
}

std::vector<loaded_library> loaded_libraries() {
    std::vector<loaded_library> libraries;
    for (const std::string & path : loaded_paths()) {
        if (loaded_library library = reopen(path)) {
            libraries.push_back(std::move(library));
        }
    }
    return libraries;
}

std::string file_at(const void * address) {
    Dl_info info = {};
    return address && dladdr(address, &info) != 0 && info.dli_fname ? info.dli_fname : "";
}

loaded_library library_at(const void * address) {
    const std::string file = file_at(address);
    if (file.empty()) {
        return {};
    }
    const loaded_library library = reopen(file);
    return library ? library : reopen(""); // of the program itself, dladdr says what it was started as
}

} // namespace gear
