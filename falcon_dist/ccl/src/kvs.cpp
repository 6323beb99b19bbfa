#include "kvs.h"

#include <algorithm>
#include <thread>

namespace falcon {

ccl::vector_class<char> StoreKvs::get(const ccl::string_class& name) {
  const std::string key = name.c_str();
  const auto left = std::chrono::duration_cast<milliseconds>(deadline_ - Clock::now());
  TORCH_CHECK_WITH(
      DistBackendError, left.count() > 0, "oneCCL's start-up: no rank wrote \"", key, "\" in time");
  // The only key that oneCCL reads to see whether it is there: a counter that starts at nothing.
  if (key.rfind("LOCAL_KVS_ID", 0) == 0 && !store_->check({key})) {
    return {};
  }
  if (key == last_key_) {
    std::this_thread::sleep_for(milliseconds(1));  // a loop until the value changes: spare the server
  }
  last_key_ = key;
  store_->wait({key}, std::max(left, milliseconds(1)));
  const std::vector<uint8_t> value = store_->get(key);
  return {value.begin(), value.end()};
}

void StoreKvs::set(const ccl::string_class& name, const ccl::vector_class<char>& data) {
  // oneCCL "removes" a key by writing an empty string, also when a communicator is destroyed. Keys are never
  // used twice here, and by then the store's process may have gone.
  if (data.size() <= 1) {
    return;
  }
  store_->set(name.c_str(), std::vector<uint8_t>(data.begin(), data.end()));
}

}  // namespace falcon
