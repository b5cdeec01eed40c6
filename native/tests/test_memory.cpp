// How much memory there is, as the machine and control groups of both versions say it, on made-up file trees.
#include "check.h"
#include "common/memory.h"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <unistd.h>

namespace {

namespace fs = std::filesystem;

constexpr size_t mib = (size_t) 1 << 20;

// A file tree in the place of "/".
struct tree {
    fs::path root = fs::temp_directory_path() / ("gearcpp-memory-" + std::to_string(getpid()));

    tree() {
        fs::remove_all(root);
        put("proc/meminfo", "MemTotal:       4194304 kB\nMemFree:         100 kB\nMemAvailable:   2097152 kB\n"); // 2 GiB
    }
    ~tree() { fs::remove_all(root); }
    tree(const tree &)             = delete;
    tree & operator=(const tree &) = delete;

    void put(const std::string & path, const std::string & text) const {
        fs::create_directories((root / path).parent_path());
        std::ofstream(root / path) << text;
    }
    void group_v2(const std::string & group, const std::string & most, size_t used, size_t cached = 0) const {
        const std::string folder = "sys/fs/cgroup" + group + "/";
        put(folder + "memory.max", most + "\n");
        put(folder + "memory.current", std::to_string(used) + "\n");
        put(folder + "memory.stat", "anon 5\nfile 77\ninactive_file " + std::to_string(cached / 2) + "\nactive_file " + std::to_string(cached / 2) + "\n");
    }
    void group_v1(const std::string & group, size_t most, size_t used, size_t cached = 0) const {
        const std::string folder = "sys/fs/cgroup/memory" + group + "/";
        put(folder + "memory.limit_in_bytes", std::to_string(most) + "\n");
        put(folder + "memory.usage_in_bytes", std::to_string(used) + "\n");
        put(folder + "memory.stat", "cache 5\ninactive_file 1\ntotal_inactive_file " + std::to_string(cached) + "\ntotal_active_file 0\n");
    }
    size_t available() const { return gear::available_memory(root.c_str()); }
};

std::string bytes(size_t n) {
    return std::to_string(n);
}

void test_no_group() {
    const tree t;
    CHECK(t.available() == 2048 * mib);
    t.put("proc/self/cgroup", "");
    CHECK(t.available() == 2048 * mib);
    t.put("proc/self/cgroup", "nonsense\n:\n::\n0:\n\n");
    CHECK(t.available() == 2048 * mib);
    t.put("proc/meminfo", "MemTotal: 5 kB\n");
    CHECK(t.available() == SIZE_MAX);
    CHECK(gear::available_memory("/nowhere/at/all") == SIZE_MAX);
}

void test_v2() {
    const tree t;
    t.put("proc/self/cgroup", "0::/system.slice/gear.service\n");
    CHECK(t.available() == 2048 * mib); // no such files
    t.group_v2("/system.slice/gear.service", "max", 100 * mib);
    CHECK(t.available() == 2048 * mib);
    t.group_v2("/system.slice/gear.service", bytes(512 * mib), 100 * mib);
    CHECK(t.available() == 412 * mib);
    t.group_v2("/system.slice/gear.service", bytes(512 * mib), 100 * mib, 60 * mib); // page cache is given back
    CHECK(t.available() == 472 * mib);
    t.group_v2("/system.slice/gear.service", bytes(512 * mib), 600 * mib);
    CHECK(t.available() == 0);
    t.group_v2("/system.slice/gear.service", bytes(512 * mib), 100 * mib);
    t.group_v2("/system.slice", bytes(400 * mib), 300 * mib); // one above it limits it more
    CHECK(t.available() == 100 * mib);
    t.put("sys/fs/cgroup/system.slice/gear.service/memory.high", bytes(150 * mib) + "\n");
    CHECK(t.available() == 50 * mib);
    t.put("sys/fs/cgroup/system.slice/gear.service/memory.high", "max\n");
    CHECK(t.available() == 100 * mib);
    t.group_v2("/system.slice", bytes(100 * 1024 * mib), 1); // more than the machine has
    t.group_v2("/system.slice/gear.service", bytes(100 * 1024 * mib), 1);
    CHECK(t.available() == 2048 * mib);
}

// A container that sees its host's path, and only its own group at the mount.
void test_container() {
    const tree t;
    t.group_v2("", bytes(256 * mib), 56 * mib);
    for (const char * line : { "0::/docker/0123456789abcdef\n", "0::/\n", "0::/../../other\n" }) {
        t.put("proc/self/cgroup", line);
        CHECK(t.available() == 200 * mib);
    }
    t.put("proc/self/cgroup", "0::/" + std::string(3000, 'x') + "\n");
    CHECK(t.available() == 200 * mib);
}

void test_v1() {
    const tree t;
    t.put("proc/self/cgroup", "11:cpu,cpuacct:/a\n10:hugetlb,memory:/batch/job\n1:name=systemd:/c\n0::/\n");
    CHECK(t.available() == 2048 * mib);
    t.group_v1("", 9223372036854771712u, 700 * mib); // unlimited, as the kernel writes it
    t.group_v1("/batch", 9223372036854771712u, 700 * mib);
    t.group_v1("/batch/job", 300 * mib, 120 * mib, 20 * mib);
    CHECK(t.available() == 200 * mib);
    t.group_v1("/batch", 1000 * mib, 900 * mib);
    CHECK(t.available() == 100 * mib);
    t.put("proc/self/cgroup", "10:memory2:/batch/job\n"); // another controller
    CHECK(t.available() == 2048 * mib);
}

} // namespace

int main() {
    test_no_group();
    test_v2();
    test_container();
    test_v1();
    return check::finish();
}
