// Memory that the ranks of one host share, which leaves no file behind whichever process dies.
#pragma once

#include <cstddef>

namespace falcon {

class SharedMemory {
 public:
  // Zeroed memory. Throws std::system_error.
  static SharedMemory create(const char* name, size_t bytes);
  // The memory another process of the same user has created. Throws std::system_error.
  static SharedMemory open(int pid, int descriptor, size_t bytes);

  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  SharedMemory& operator=(SharedMemory&&) = delete;
  ~SharedMemory();

  int descriptor() const { return descriptor_; }
  char* data() const { return data_; }

 private:
  SharedMemory(int descriptor, size_t bytes);

  int descriptor_;
  size_t bytes_;
  char* data_;
};

}  // namespace falcon
