// The work of one device: tables and items that lie there, and every step's launches.
//
// Tensors are sorted into buckets by mix and number of states, the largest first. A step names for each tensor its
// gradient and coefficient row; they are packed into kernel parameters, one launch for each bucket and chain while they
// fit. A step like the last one (the same tensors take part, those that shared a row share one) is packed already: only
// gradients and rows are new. Host code only, of no device in particular: the driver runs the kernels, and memory comes
// from the `Memory` it is given. Without a driver there are no tables and no launches: somebody else has both, and
// takes from `taken` what a step gives each tensor.
#pragma once

#include <cstdint>
#include <functional>
#include <unordered_map>
#include <vector>

#include "cpu_driver.h"
#include "device_driver.h"
#include "device_rows.h"
#include "memo.h"

namespace fastopt {

// Device memory, from and to the framework's allocator. It lives as long as this object's owner keeps it.
struct DeviceMemory {
  std::function<char*(int device, size_t bytes)> allocate;
  std::function<void(int device, char* to, const char* from, size_t bytes)> upload;
};

struct DeviceEntry {
  DeviceTensor tensor;  // its `parts` and `strides` are filled in here
  const Walk* walk;     // null: dense
  int8_t slots;         // how many states
};

// The mix whose kernels take a tensor, given which the driver has.
Mix mix_of(const DeviceEntry& entry, bool aligned, const DeviceDriver& driver);

class DevicePlan {
 public:
  static constexpr uint32_t no_row = ~uint32_t{0};

  DevicePlan(const DeviceDriver* driver, int device) : driver_(driver), device_(device) {}

  int device() const { return device_; }
  // Returns the number by which the tensor is known in `set`. `counters`: those on the device, null if they are not.
  size_t add(const DeviceEntry& entry, bool aligned, const DeviceCounters* counters);
  // After the last `add`: makes the tables and brings them to the device.
  void place(const DeviceMemory& memory);

  // Forgets the last step: what takes part in this one is named by set().
  void begin_step();
  // A tensor whose row is known; `gradient` is p itself for one that has none. Returns the row's number in this step.
  uint32_t set(size_t number, const void* gradient, const Row& row);
  // One with counters on the device, whose row is made there. `slots` is how many states the plan knows of.
  void set(size_t number, const void* gradient, const DeviceSetting& setting, bool stepped, int slots);
  // Instead, where this step is like the last one, or nobody needs to know a row: a tensor's gradient (on any thread).
  // Then, for each number that set() returned, the row that follows it; false if different rows follow one. Last of
  // all, whether none is missing.
  void renew(size_t number, const void* gradient) {
    const auto [bucket, position] = where_[number];
    buckets_[bucket].gradients[position] = gradient;
  }
  void begin_renewal() { ++step_; }
  bool renew_row(uint32_t row_number, const Row& row);
  bool renewed() const;

  // Lays out this step's launches. Before any of them, or it throws: there is a chain that no kernel was compiled for.
  void pack();
  void launch(void* stream, const float* found_inf, const float* grad_scale);

  // Without a driver: the places of tensors in what `taken` gives, by the number of `add`; no two the same.
  void arrange(std::vector<uint32_t> places);
  // What a step gives to tensors that take one chain, by place: the gradients (of all tensors), a row's number or -1,
  // and the rows.
  struct Taken {
    int16_t chain;
    int8_t first_slot;
    std::vector<int32_t> numbers;
    std::vector<float> f32;
    std::vector<double> f64;
  };
  const std::vector<const void*>& gradients() const { return buckets_.at(0).gradients; }
  std::vector<Taken> taken() const;

  // For tests and `explain`: how many kernels the last step launched.
  int launches() const { return launches_; }

 private:
  struct ChainUse {
    int16_t chain;
    int8_t first_slot;
    bool operator==(const ChainUse&) const = default;
  };
  // A row that tensors take in this step.
  struct StepRow {
    const Row* row;
    ChainUse use;
    uint64_t step;
  };
  struct Bucket {
    Mix mix;
    int8_t slots;  // of each tensor: the slow weights are the last
    bool counted;  // the counters are on the device, and the rows
    bool centralise = false;
    std::vector<DeviceEntry> entries;
    std::vector<DeviceCounters> counters;
    std::vector<size_t> numbers;  // of `set`, by position
    std::vector<WorkItem> items, sums;
    std::vector<size_t> first_item, first_sum;  // by position, and the end
    const DeviceTensor* table;                  // these three on the device
    const WorkItem* device_items;
    const WorkItem* device_sums;
    size_t first_counted = 0;            // the position of its first tensor among all that are counted
    std::vector<const void*> gradients;  // this step's, by position
    std::vector<uint32_t> rows;          // no_row: left out, or counted
    std::vector<uint16_t> codes;         // if counted
    std::vector<ChainUse> counted_uses;  // the chains that rows made on the device may name
    bool any() const { return is_any(mix); }
    bool wide() const { return is_wide(mix); }
  };

  // A launch: tensors of a bucket that take one chain, and everything of its parameters but gradients and rows.
  struct Part {
    const Bucket* bucket;
    ChainUse use;
    size_t at, tensors;
    bool all;                       // every one of these tensors takes part
    std::vector<uint16_t> numbers;  // of each tensor's row in `rows`; absent_number: it takes no part
    std::vector<uint32_t> rows;
  };
  static constexpr uint16_t absent_number = 0xffff;

  void sort(Bucket& bucket);
  void cut(Bucket& bucket);
  static void use(Bucket& bucket, int16_t chain, int first_slot);
  bool takes(const Bucket& bucket, size_t at, ChainUse use) const;
  std::vector<ChainUse> uses(const Bucket& bucket) const;
  void make_rows(void* stream, const float* found_inf);
  size_t pack_part(const Bucket& bucket, size_t at, ChainUse use);
  void launch(const Part& part, void* stream, const float* found_inf, const float* grad_scale);

  const DeviceDriver* driver_;
  int device_;
  int row_bits_ = 0;
  size_t added_ = 0;
  std::vector<Bucket> buckets_;
  std::vector<std::pair<uint32_t, uint32_t>> where_;      // bucket and position, by number
  std::vector<StepRow> rows_;                             // of this step, by number
  std::unordered_map<const Row*, uint32_t> row_numbers_;  // in rows_
  uint32_t last_row_ = 0;                                 // that was set
  uint64_t step_ = 0;
  std::vector<uint16_t> number_of_;  // those rows' numbers in the launch being packed
  std::vector<Part> parts_;
  bool packed_ = false;          // parts_ are this step's, and the next one's if it is like this one
  std::vector<uint16_t> codes_;  // of all counted tensors
  std::vector<DeviceSetting> settings_;
  std::vector<uint16_t> local_settings_, used_settings_;  // their numbers in the launch being made, and back
  const DeviceCounters* device_counters_ = nullptr;
  DeviceRow* device_rows_ = nullptr;
  int launches_ = 0;
  Arguments<tiers - 1> arguments_;
  RowsArguments<tiers - 1> rows_arguments_;
};

}  // namespace fastopt
