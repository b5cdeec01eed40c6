#include "common/memory.h"

#include "common/error.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <new>
#include <sys/mman.h>
#include <utility>

namespace gear {

namespace {

constexpr double mebibyte = 1024.0 * 1024.0;

} // namespace

aligned_buffer::~aligned_buffer() {
    ::operator delete(data_, std::align_val_t(cache_line));
}

uint8_t * aligned_buffer::reserve(size_t bytes) {
    if (bytes > size_) {
        uint8_t * larger = (uint8_t *) ::operator new(bytes, std::align_val_t(cache_line));
        ::operator delete(data_, std::align_val_t(cache_line));
        data_ = larger;
        size_ = bytes;
    }
    return data_;
}

mapping::mapping(size_t bytes) : size_(bytes) {
    if (bytes == 0) {
        return;
    }
    void * pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) {
        fail(GEAR_ERROR_MEMORY, "the system refused %.1f MiB for the cache (%s): use a shorter context or fewer bits", bytes / mebibyte, strerror(errno));
    }
    data_ = (uint8_t *) pages;
}

mapping::~mapping() {
    if (data_) {
        munmap(data_, size_);
    }
}

mapping::mapping(mapping && other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

mapping & mapping::operator=(mapping && other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

void mapping::discard() {
    if (data_) {
        madvise(data_, size_, MADV_DONTNEED); // only a hint: where it fails the pages stay
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------
// What there is of it: no allocation here, for this is asked when memory is short
// ---------------------------------------------------------------------------------------------------------------------------------------------

namespace {

constexpr size_t most_path = 4096;

// The number behind `key` in a file of lines (key "": the first thing in it). false: there is none, as where a limit is "max".
bool read_number(const char * path, const char * key, uint64_t & number) {
    FILE * file = fopen(path, "r");
    if (!file) {
        return false;
    }
    const size_t n_key = strlen(key);
    char         line[256];
    bool         found = false;
    while (!found && fgets(line, sizeof line, file)) {
        found = strncmp(line, key, n_key) == 0 && sscanf(line + n_key, "%" SCNu64, &number) == 1;
    }
    fclose(file);
    return found;
}

// The names of one version of Linux's control groups.
struct group_names {
    const char *mount, *limits[2], *usage, *files[2];
};
constexpr group_names v1 = {
    "/sys/fs/cgroup/memory", { "memory.limit_in_bytes", nullptr }, "memory.usage_in_bytes", { "total_inactive_file ", "total_active_file " }
};
constexpr group_names v2 = { "/sys/fs/cgroup", { "memory.max", "memory.high" }, "memory.current", { "inactive_file ", "active_file " } };

// What the limits of one group leave. Its page cache is given back when memory is needed, and does not count as used, just as in MemAvailable.
uint64_t left_in_group(const char * folder, const group_names & names) {
    char       path[most_path];
    const auto read = [&](const char * file, const char * key, uint64_t & number) {
        return snprintf(path, sizeof path, "%s/%s", folder, file) < (int) sizeof path && read_number(path, key, number);
    };
    uint64_t limit = UINT64_MAX, used = 0;
    for (const char * name : names.limits) {
        uint64_t number;
        if (name && read(name, "", number)) {
            limit = std::min(limit, number);
        }
    }
    if (limit == UINT64_MAX || !read(names.usage, "", used)) {
        return UINT64_MAX;
    }
    for (const char * key : names.files) {
        uint64_t cached = 0;
        read("memory.stat", key, cached);
        used -= std::min(used, cached);
    }
    return limit - std::min(limit, used);
}

// Every group above a group limits it, too. Inside of a container the path may be the host's, of which only the container's own group is to be seen, at
// the mount: the others are not found and limit nothing.
uint64_t left_in_groups(const char * root, const group_names & names, char * group) {
    uint64_t left = UINT64_MAX;
    for (bool is_top = false; !is_top;) {
        is_top = group[0] == '\0';
        char folder[most_path];
        if (!strstr(group, "/..") && snprintf(folder, sizeof folder, "%s%s%s", root, names.mount, group) < (int) sizeof folder) {
            left = std::min(left, left_in_group(folder, names));
        }
        if (char * last = strrchr(group, '/')) {
            *last = '\0';
        } else {
            group[0] = '\0';
        }
    }
    return left;
}

// Lines of /proc/self/cgroup: "4:memory,hugetlb:/path" of version 1, "0::/path" of version 2.
uint64_t left_in_all_groups(const char * root) {
    char path[most_path];
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *   file = fopen(path, "r");
    uint64_t left = UINT64_MAX;
    char     line[most_path];
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        char * controllers        = strchr(line, ':');
        char * group              = controllers ? strchr(controllers + 1, ':') : nullptr;
        if (!group) {
            continue;
        }
        *group++ = '\0';
        if (strcmp(controllers, ":") == 0) {
            left = std::min(left, left_in_groups(root, v2, group));
        }
        for (char *rest = controllers + 1, *name; (name = strsep(&rest, ","));) {
            left = strcmp(name, "memory") == 0 ? std::min(left, left_in_groups(root, v1, group)) : left;
        }
    }
    if (file) {
        fclose(file);
    }
    return left;
}

} // namespace

size_t available_memory(const char * root) {
    char     path[most_path];
    uint64_t kibibytes = 0;
    snprintf(path, sizeof path, "%s/proc/meminfo", root);
    const uint64_t of_machine = read_number(path, "MemAvailable:", kibibytes) ? kibibytes * 1024 : UINT64_MAX;
    return (size_t) std::min<uint64_t>({ of_machine, left_in_all_groups(root), SIZE_MAX });
}

void require_memory(size_t bytes, const char * what) {
    const size_t available = available_memory();
    if (bytes > available) {
        fail(GEAR_ERROR_MEMORY,
             "%s needs %.1f MiB, but only %.1f MiB of memory are available: use a shorter context (n_ctx), fewer bits or a smaller n_ubatch", what,
             bytes / mebibyte, available / mebibyte);
    }
}

} // namespace gear

extern "C" int64_t gear_available_memory(void) {
    return (int64_t) std::min<size_t>(gear::available_memory(), INT64_MAX);
}
