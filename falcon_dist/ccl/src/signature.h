// What one rank says about the collective it is in: enough to see that two ranks disagree.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <type_traits>

namespace falcon {

// Plain bytes, because it is copied through shared memory and through the store.
struct Signature {
  uint64_t sequence = 0;   // position in the group's order of operations, from 1
  char operation[24] = {};  // "all_reduce"
  char dtype[12] = {};      // "BFloat16"; empty where bytes are moved
  char detail[12] = {};     // "sum", "root 3"; empty where there is none
  int64_t count = -1;       // elements (bytes where dtype is empty); -1 where ranks may differ

  bool same_call(const Signature& other) const {
    return operation == std::string(other.operation) && dtype == std::string(other.dtype) &&
        detail == std::string(other.detail) && (count == other.count || count < 0 || other.count < 0);
  }

  // Equal on all ranks whose calls agree (FNV-1a).
  uint64_t hash() const {
    uint64_t value = 14695981039346656037ull;
    const auto* bytes = reinterpret_cast<const unsigned char*>(this);
    for (size_t index = 0; index < sizeof(*this); ++index) {
      value = (value ^ bytes[index]) * 1099511628211ull;
    }
    return value;
  }

  std::string text() const {
    std::ostringstream out;
    out << operation << " #" << sequence;
    if (count >= 0) {
      out << " of " << count << ' ' << (*dtype ? dtype : "bytes");
    }
    if (*detail) {
      out << " (" << detail << ')';
    }
    return out.str();
  }
};

static_assert(std::is_trivially_copyable_v<Signature>);
static_assert(sizeof(Signature) == 64);  // no padding, so the hash sees only what was written

}  // namespace falcon
