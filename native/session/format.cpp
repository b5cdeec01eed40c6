#include "session/format.h"

#include "common/checksum.h"
#include "common/error.h"

#include <algorithm>

namespace gear {

namespace {

constexpr char   magic[8]   = { 'G', 'E', 'A', 'R', 'S', 'E', 'S', 'S' };
constexpr size_t head_bytes = sizeof magic + 2 * sizeof(uint32_t), sum_bytes = sizeof(uint64_t);
constexpr size_t section_head_bytes = 2 * sizeof(uint32_t) + sizeof(uint64_t);
constexpr size_t block_bytes        = (size_t) 1 << 20; // read at once

struct counting_output final : output {
    void     write(const void *, size_t n) override { size += n; }
    uint64_t size = 0;
};

struct summing_output final : output {
    explicit summing_output(output & target) : target(target) {}
    void write(const void * data, size_t n) override {
        sum.add(data, n);
        target.write(data, n);
    }
    output & target;
    checksum sum;
};

struct file_head {
    char     name[sizeof magic];
    uint32_t version, reserved;
    uint64_t sum;

    uint64_t expected_sum() const {
        uint8_t bytes[head_bytes];
        memcpy(bytes, name, sizeof magic);
        memcpy(bytes + sizeof magic, &version, sizeof version);
        memcpy(bytes + sizeof magic + sizeof version, &reserved, sizeof reserved);
        return checksum_of(bytes, sizeof bytes);
    }
};
static_assert(sizeof(file_head) == head_bytes + sum_bytes, "the head is written as it lies in memory");

struct section_head {
    uint32_t kind, reserved;
    uint64_t size;
};
static_assert(sizeof(section_head) == section_head_bytes, "a section's head is written as it lies in memory");

[[noreturn]] void fail_cut_off(const input & in) {
    fail(GEAR_ERROR_DATA, "it is cut off or damaged (%llu bytes)", (unsigned long long) in.size());
}

void check_head(const input & in) {
    file_head head = {};
    in.read(0, &head, std::min<uint64_t>(in.size(), sizeof head));
    if (in.size() < sizeof magic || memcmp(head.name, magic, sizeof magic) != 0) {
        fail(GEAR_ERROR_DATA, "it is not a gearcpp session");
    }
    if (in.size() < sizeof head) {
        fail_cut_off(in);
    }
    if (head.sum != head.expected_sum()) {
        fail(GEAR_ERROR_DATA, "it is damaged: the checksum of its head is wrong");
    }
    if (head.version != session_version) {
        fail(GEAR_ERROR_DATA, "it is of version %u, and this gearcpp reads version %u: use the gearcpp that wrote it", head.version, session_version);
    }
}

// The section at `offset`, after every byte of it was read.
section check_section(const input & in, uint64_t offset, std::vector<uint8_t> & block) {
    if (in.size() - offset < section_head_bytes + sum_bytes) {
        fail_cut_off(in);
    }
    section_head head;
    in.read(offset, &head, sizeof head);
    const section found = { (section_kind) head.kind, offset + section_head_bytes, head.size };
    if (found.size > in.size() - found.offset - sum_bytes) {
        fail_cut_off(in);
    }
    checksum sum;
    sum.add(&head, sizeof head);
    block.resize(std::min<uint64_t>(block_bytes, std::max<uint64_t>(found.size, block.size())));
    for (uint64_t done = 0; done < found.size;) {
        const size_t n = (size_t) std::min<uint64_t>(block.size(), found.size - done);
        in.read(found.offset + done, block.data(), n);
        sum.add(block.data(), n);
        done += n;
    }
    uint64_t expected;
    in.read(found.offset + found.size, &expected, sizeof expected);
    if (sum.value() != expected) {
        fail(GEAR_ERROR_DATA, "it is damaged: the checksum of the %llu bytes from byte %llu on is wrong", (unsigned long long) found.size,
             (unsigned long long) found.offset);
    }
    return found;
}

uint64_t end_of(const section & of) {
    return of.offset + of.size + sum_bytes;
}

} // namespace

void write_head(output & out) {
    file_head head = {};
    memcpy(head.name, magic, sizeof magic);
    head.version = session_version;
    head.sum     = head.expected_sum();
    out.put(head);
}

void write_section(output & out, section_kind kind, const std::function<void(output &)> & body) {
    counting_output counted;
    body(counted);
    summing_output summed(out);
    summed.put(section_head{ (uint32_t) kind, 0, counted.size });
    body(summed);
    out.put(summed.sum.value());
}

std::vector<section> check_sections(const input & in) {
    check_head(in);
    std::vector<section> sections;
    std::vector<uint8_t> block;
    for (uint64_t offset = sizeof(file_head);;) {
        const section found = check_section(in, offset, block);
        offset              = end_of(found);
        if (found.kind == section_kind::end) {
            if (found.size != 0 || offset != in.size()) {
                fail(GEAR_ERROR_DATA, "it is damaged: something follows its end");
            }
            return sections;
        }
        sections.push_back(found);
    }
}

section check_first_section(const input & in) {
    check_head(in);
    std::vector<uint8_t> block;
    return check_section(in, sizeof(file_head), block);
}

void cursor::require(uint64_t n, uint64_t item_size) const {
    if (item_size > 0 && n > left() / item_size) {
        fail(GEAR_ERROR_DATA, "it is inconsistent: a section ends before its contents do");
    }
}

void cursor::bytes(void * data, size_t n) {
    require(n, 1);
    uint8_t * out = (uint8_t *) data;
    while (n > 0) {
        if (n_ahead() == 0) {
            block_.resize((size_t) std::min<uint64_t>(block_bytes / 16, end_ - at_));
            in_.read(at_, block_.data(), block_.size());
            at_ += block_.size();
            taken_ = 0;
        }
        const size_t n_now = std::min<size_t>(n, n_ahead());
        std::copy_n(block_.data() + taken_, n_now, out);
        taken_ += n_now;
        out += n_now;
        n -= n_now;
    }
}

void cursor::skip(uint64_t n) {
    require(n, 1);
    const uint64_t to = offset() + n;
    block_.clear();
    taken_ = 0;
    at_    = to;
}

} // namespace gear
