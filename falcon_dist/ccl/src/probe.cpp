// What falcon_dist.host_facts tells of a host, without Python: loading libtorch takes a fifth of importing torch.
//
// One JSON object on the last line of stdout, with the names that falcon_dist.host_facts gives. The first product
// is a bf16 linear layer: under oneDNN's verbose mode its first line tells which kernel that takes.
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <net/if.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "trial.h"

namespace {

using std::chrono::milliseconds;

constexpr milliseconds kPatience{20'000};  // as in falcon_dist/exchange.py
constexpr milliseconds kLeaving{5'000};

void multiply() {
  const auto bf16 = at::TensorOptions(at::kBFloat16);
  at::linear(at::randn({64, 256}, bf16), at::randn({256, 256}, bf16), at::randn({256}, bf16));
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
    }
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + "\"";
}

std::string setting(const char* name) {
  const char* const value = std::getenv(name);
  TORCH_CHECK_VALUE(value && *value, "environment: ", name, " is not set");
  return value;
}

int number(const char* name) {
  const std::string text = setting(name);
  const bool whole = text.size() < 10 && text.find_first_not_of("0123456789") == std::string::npos;
  TORCH_CHECK_VALUE(whole, "environment: ", name, " must be a whole number: \"", text, "\"");
  return std::stoi(text);
}

// libfabric would take any other interface silently.
void check_interface() {
  const char* const name = std::getenv("FI_TCP_IFACE");
  TORCH_CHECK_VALUE(!name || if_nametoindex(name), "FI_TCP_IFACE: no such interface: \"", name ? name : "", "\"");
}

c10::intrusive_ptr<c10d::Store> open_store(int rank, int size) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(number("MASTER_PORT"));
  options.isServer = rank == 0;
  options.numWorkers = size;
  options.waitWorkers = false;
  options.timeout = kPatience;
  if (std::getenv("FALCON_STORE_FD")) {
    options.masterListenFd = number("FALCON_STORE_FD");
  }
  return c10::make_intrusive<c10d::TCPStore>(setting("MASTER_ADDR"), options);
}

// The last to leave is the one that serves the store: nobody loses a peer, or the store, before it has told its fault
// or has finished its last collective.
void leave(c10d::Store& store, int rank, int size) {
  const std::vector<uint8_t> here{1};
  const auto everybody = [size](const std::string& place) {
    std::vector<std::string> keys;
    for (int other = 0; other < size; ++other) {
      keys.push_back(place + std::to_string(other));
    }
    return keys;
  };
  store.set("leaving/" + std::to_string(rank), here);
  store.wait(everybody("leaving/"), kLeaving);
  store.set("left/" + std::to_string(rank), here);
  if (rank == 0) {
    store.wait(everybody("left/"), kLeaving);
  }
}

std::string first_line(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : text.substr(begin, text.find_first_of("\r\n", begin) - begin);
}

std::string fault(const std::exception& error) {
  const auto* const torchs = dynamic_cast<const c10::Error*>(&error);
  return "{\"fault\": " + quoted(first_line(torchs ? torchs->what_without_backtrace() : error.what())) + "}";
}

std::string measure(c10::intrusive_ptr<c10d::Store> store, int rank, int size) {
  try {
    const double rate = falcon::all_reduce_rate(std::move(store), rank, size, kPatience);
    return "{\"backend\": \"ccl\", \"bytes_per_s\": " + std::to_string(rate) + "}";
  } catch (const std::exception& error) {
    return fault(error);
  }
}

std::string exchange() {
  std::string told;
  try {
    check_interface();
    const int rank = number("RANK"), size = number("WORLD_SIZE");
    const auto store = open_store(rank, size);
    told = measure(store, rank, size);
    leave(*store, rank, size);
  } catch (const std::exception& error) {
    // What was measured stands, whoever is missing at the end.
    return told.empty() ? fault(error) : told;
  }
  return told;
}

}  // namespace

int main() {
  try {
    multiply();
    std::string told = "\"torch\": " + quoted(FALCON_TORCH_VERSION) + ", \"gloo\": " + FALCON_TORCH_GLOO;
    if (std::getenv("MASTER_ADDR")) {
      told += ", \"all_reduce\": " + exchange();
    }
    std::printf("{%s}\n", told.c_str());
    std::fflush(nullptr);
    _exit(0);  // threads of libccl and of the store still run
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", first_line(error.what()).c_str());
    _exit(1);
  }
}
