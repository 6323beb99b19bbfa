// oneCCL's key-value store, kept in the c10d store that the process group already has.
//
// oneCCL's own store opens a listening socket on an interface it guesses; this one needs neither a port nor
// an interface, and a rank that does not come is an exception instead of an endless loop.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <oneapi/ccl.hpp>

#include "library.h"

namespace falcon {

class StoreKvs final : public ccl::kvs_interface {
 public:
  StoreKvs(c10::intrusive_ptr<c10d::Store> store, Clock::time_point deadline)
      : store_(std::move(store)), deadline_(deadline) {}

  // Waits until a rank has set the key. Throws c10::Error past the deadline.
  ccl::vector_class<char> get(const ccl::string_class& key) override;
  void set(const ccl::string_class& key, const ccl::vector_class<char>& data) override;
  int get_id() override { return 0; }

 private:
  const c10::intrusive_ptr<c10d::Store> store_;
  const Clock::time_point deadline_;
  std::string last_key_;
};

}  // namespace falcon
