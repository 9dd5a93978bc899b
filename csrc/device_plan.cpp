#include "device_plan.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "chains.h"

namespace fastopt {
namespace {

// Slices share an item as long as they are this short together and there are enough items to keep a large device busy:
// 132 multiprocessors, each with 32 warps or so, twice.
constexpr int least_row_bits = 8, most_row_bits = 11;
constexpr int64_t enough_items = 8192;

// Vectors of every stream that a lane gets where items are dealt out. Of twelve rules and mixes on an H200, eight take
// the least time with two; one vector takes -1 to +4 % more, four -1 to +2 %, eight +2 to +4 %
// (bench/results/tuning.csv).
constexpr int vectors = 2;

// The elements that a warp of a mix takes at once.
int64_t at_once(Mix mix) { return lanes * vector_length(mix); }

template <class... Chains>
constexpr int coefficient_counts[] = {Chains::coefficients...};
template <class... Chains>
int count_of(int chain, List<Chains...>) {
  return coefficient_counts<Chains...>[chain];
}

template <class Chain, class... Chains>
constexpr bool is_one_of = (std::is_same_v<Chain, Chains> || ...);
// Whether the chain of this number, in the first list, is in the second.
template <class... All, class... Some>
bool is_in(int chain, List<All...>, List<Some...>) {
  static constexpr bool found[] = {is_one_of<All, Some...>...};
  return found[chain];
}

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Bytes of a payload and where its parts begin.
struct PayloadShape {
  size_t indices_at, rows_at, bytes;
  PayloadShape(size_t tensors, size_t rows, size_t row_bytes)
      : indices_at(tensors * sizeof(void*)),
        rows_at(round_up(indices_at + tensors * sizeof(uint16_t), alignment)),
        bytes(rows_at + rows * row_bytes) {}
};

size_t bytes_of_row(int chain, bool wide) {
  return count_of(chain, Chains{}) * (wide ? sizeof(double) : sizeof(float));
}

uint32_t fits_32(int64_t n) {
  if (n < 0 || n > UINT32_MAX) throw std::length_error("fastopt: a tensor has more work items than 32 bits can count");
  return static_cast<uint32_t>(n);
}

}  // namespace

Mix stored_as(const DeviceTensor& t) {
  if (t.g_dtype != t.p_dtype) return any_mix(t.p_dtype);
  return mix_of(t.p_dtype, t.s_dtype, static_cast<int>(std::find(t.s, t.s + max_slots, nullptr) - t.s));
}

Mix mix_of(const DeviceEntry& entry, bool aligned, const DeviceDriver& driver) {
  const Mix mix = stored_as(entry.tensor);
  return aligned && !entry.walk && driver.has_mix[static_cast<int>(mix)] ? mix : any_mix(entry.tensor.p_dtype);
}

size_t DevicePlan::add(const DeviceEntry& entry, bool aligned, const DeviceCounters* counters) {
  const bool counted = counters != nullptr;
  if (!driver_) {
    if (counted) throw std::invalid_argument("fastopt: counters on a device need its driver");
    if (buckets_.empty()) buckets_.emplace_back();
    return added_++;
  }
  const Mix mix = mix_of(entry, aligned, *driver_);
  auto bucket = std::find_if(buckets_.begin(), buckets_.end(), [&](const Bucket& b) {
    return b.mix == mix && b.slots == entry.slots && b.counted == counted;
  });
  if (bucket == buckets_.end()) {
    bucket = buckets_.emplace(buckets_.end());
    bucket->mix = mix;
    bucket->slots = entry.slots;
    bucket->counted = counted;
  }
  if (counted) bucket->counters.push_back(*counters);
  bucket->entries.push_back(entry);
  bucket->numbers.push_back(added_);
  bucket->centralise = bucket->centralise || entry.tensor.row_length > 0;
  return added_++;
}

// The largest first, so that the last items to run are short.
void DevicePlan::sort(Bucket& bucket) {
  std::vector<size_t> order(bucket.entries.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return bucket.entries[a].tensor.n > bucket.entries[b].tensor.n; });
  const auto permute = [&](auto& list) {
    if (list.empty()) return;
    auto sorted = list;
    for (size_t i = 0; i < order.size(); ++i) sorted[i] = list[order[i]];
    list = std::move(sorted);
  };
  permute(bucket.entries);
  permute(bucket.numbers);
  permute(bucket.counters);
}

void DevicePlan::cut(Bucket& bucket) {
  for (size_t i = 0; i < bucket.entries.size(); ++i) {
    const DeviceTensor& t = bucket.entries[i].tensor;
    const int64_t length = t.row_length;
    bucket.first_item.push_back(bucket.items.size());
    bucket.first_sum.push_back(bucket.sums.size());
    int64_t items = bucket.any() ? ceil_div(t.n, any_length) : dealt_items(t.n, at_once(bucket.mix), vectors), sums = 0;
    if (length > longest_row) {
      items = t.n / length * pieces_of(length);
      sums = t.n / length * parts_of(length);
    } else if (length > 0) {
      items = ceil_div(t.n / length, rows_per_item(length, int64_t{1} << row_bits_));
    }
    const uint32_t tensor = fits_32(static_cast<int64_t>(i));
    for (uint32_t k = 0, n = fits_32(items); k < n; ++k) bucket.items.push_back({tensor, k});
    for (uint32_t k = 0, n = fits_32(sums); k < n; ++k) bucket.sums.push_back({tensor, k});
  }
  bucket.first_item.push_back(bucket.items.size());
  bucket.first_sum.push_back(bucket.sums.size());
}

namespace {

// Device memory laid out piece by piece: what is brought there, then scratch.
class Blob {
 public:
  size_t reserve(size_t bytes) {
    const size_t at = size_;
    size_ = round_up(size_ + bytes, 64);
    return at;
  }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

DeviceStrides device_strides(const Walk& walk) {
  DeviceStrides result{};
  result.dims = static_cast<int32_t>(walk.sizes.size());
  if (result.dims > max_device_dims) throw std::invalid_argument("fastopt: too many dimensions for a device kernel");
  std::copy(walk.sizes.begin(), walk.sizes.end(), result.sizes);
  for (int k = 0; k < 2 + max_slots; ++k) std::copy(walk.strides[k].begin(), walk.strides[k].end(), result.strides[k]);
  return result;
}

template <class T>
void put(std::vector<char>& host, size_t at, const T* from, size_t count) {
  if (count) std::memcpy(host.data() + at, from, count * sizeof(T));
}

}  // namespace

void DevicePlan::arrange(std::vector<uint32_t> places) {
  if (driver_ || places.size() != added_)
    throw std::invalid_argument("fastopt: a place for each tensor, and no driver");
  where_.clear();
  for (const uint32_t place : places) {
    if (place >= added_) throw std::out_of_range("fastopt: a place beyond the last tensor's");
    where_.push_back({0, place});
  }
  buckets_.at(0).gradients.assign(added_, nullptr);
  buckets_.at(0).rows.assign(added_, no_row);
}

void DevicePlan::place(const DeviceMemory& memory) {
  if (!driver_) {
    std::vector<uint32_t> places(added_);
    std::iota(places.begin(), places.end(), uint32_t{0});
    return arrange(std::move(places));
  }
  int64_t total = 0;
  for (const Bucket& bucket : buckets_)
    for (const DeviceEntry& entry : bucket.entries) total += entry.tensor.n;
  row_bits_ = most_row_bits;
  while (row_bits_ > least_row_bits && total >> row_bits_ < enough_items) --row_bits_;
  where_.resize(added_);

  struct Places {
    size_t table, items, sums, strides, parts;
  };
  std::vector<Places> places;
  std::vector<DeviceCounters> counters;
  Blob blob;
  for (uint32_t b = 0; b < buckets_.size(); ++b) {
    Bucket& bucket = buckets_[b];
    if (bucket.counted) driver_->load(device_, bucket.mix, bucket.centralise);  // its steps may be captured
    sort(bucket);
    cut(bucket);
    for (uint32_t i = 0; i < bucket.numbers.size(); ++i) where_[bucket.numbers[i]] = {b, i};
    bucket.gradients.resize(bucket.entries.size());
    bucket.rows.resize(bucket.entries.size(), no_row);
    bucket.codes.resize(bucket.entries.size());
    bucket.first_counted = counters.size();
    counters.insert(counters.end(), bucket.counters.begin(), bucket.counters.end());
    places.push_back({blob.reserve(bucket.entries.size() * sizeof(DeviceTensor)),
                      blob.reserve(bucket.items.size() * sizeof(WorkItem)),
                      blob.reserve(bucket.sums.size() * sizeof(WorkItem)),
                      blob.reserve(bucket.entries.size() * sizeof(DeviceStrides) * bucket.any()), 0});
  }
  const size_t counters_at = blob.reserve(counters.size() * sizeof(DeviceCounters));
  const size_t brought = blob.size();
  const size_t rows_at = blob.reserve(counters.size() * sizeof(DeviceRow));
  codes_.resize(counters.size());
  for (size_t b = 0; b < buckets_.size(); ++b) places[b].parts = blob.reserve(buckets_[b].sums.size() * sizeof(Pair));
  if (blob.size() == 0) return;

  char* const base = memory.allocate(device_, blob.size());
  std::vector<char> host(brought);
  put(host, counters_at, counters.data(), counters.size());
  device_counters_ = reinterpret_cast<const DeviceCounters*>(base + counters_at);
  device_rows_ = reinterpret_cast<DeviceRow*>(base + rows_at);
  for (size_t b = 0; b < buckets_.size(); ++b) {
    Bucket& bucket = buckets_[b];
    const Places& at = places[b];
    std::vector<DeviceTensor> table;
    std::vector<DeviceStrides> strides(bucket.entries.size());
    for (size_t i = 0; i < bucket.entries.size(); ++i) {
      DeviceTensor tensor = bucket.entries[i].tensor;
      tensor.stored = stored_as(tensor);
      if (bucket.first_sum[i] != bucket.first_sum[i + 1])
        tensor.parts = reinterpret_cast<Pair*>(base + at.parts) + bucket.first_sum[i];
      if (bucket.entries[i].walk) {
        strides[i] = device_strides(*bucket.entries[i].walk);
        tensor.strides = reinterpret_cast<const DeviceStrides*>(base + at.strides) + i;
        put(host, at.strides + i * sizeof(DeviceStrides), &strides[i], 1);
      }
      table.push_back(tensor);
    }
    put(host, at.table, table.data(), table.size());
    put(host, at.items, bucket.items.data(), bucket.items.size());
    put(host, at.sums, bucket.sums.data(), bucket.sums.size());
    bucket.table = reinterpret_cast<const DeviceTensor*>(base + at.table);
    bucket.device_items = reinterpret_cast<const WorkItem*>(base + at.items);
    bucket.device_sums = reinterpret_cast<const WorkItem*>(base + at.sums);
    bucket.items = {};  // only their numbers are needed from here on
    bucket.sums = {};
  }
  memory.upload(device_, base, host.data(), host.size());
}

void DevicePlan::begin_step() {
  settings_.clear();
  rows_.clear();
  row_numbers_.clear();
  ++step_;
  packed_ = false;
  std::fill(codes_.begin(), codes_.end(), uint16_t{absent});
  for (Bucket& bucket : buckets_) {
    std::fill(bucket.gradients.begin(), bucket.gradients.end(), nullptr);
    std::fill(bucket.rows.begin(), bucket.rows.end(), no_row);
    std::fill(bucket.codes.begin(), bucket.codes.end(), uint16_t{absent});
    bucket.counted_uses.clear();
  }
}

void DevicePlan::use(Bucket& bucket, int16_t chain, int first_slot) {
  const ChainUse used{chain, static_cast<int8_t>(first_slot)};
  std::vector<ChainUse>& known = bucket.counted_uses;
  if (chain >= 0 && std::find(known.begin(), known.end(), used) == known.end()) known.push_back(used);
}

uint32_t DevicePlan::set(size_t number, const void* gradient, const Row& row) {
  if (rows_.empty() || rows_[last_row_].row != &row) {  // most often it is that of the tensor before
    const auto [known, is_new] = row_numbers_.try_emplace(&row, static_cast<uint32_t>(rows_.size()));
    if (is_new) rows_.push_back({&row, {row.chain, row.first_slot}, step_});
    last_row_ = known->second;
  }
  const auto [b, position] = where_[number];
  buckets_[b].gradients[position] = gradient;
  buckets_[b].rows[position] = last_row_;
  return last_row_;
}

bool DevicePlan::renew_row(uint32_t row_number, const Row& row) {
  StepRow& known = rows_[row_number];
  if (known.step == step_) return known.row == &row;
  const ChainUse used{row.chain, row.first_slot};
  packed_ = packed_ && known.use == used;
  known = {&row, used, step_};
  return true;
}

bool DevicePlan::renewed() const {
  return std::all_of(rows_.begin(), rows_.end(), [&](const StepRow& known) { return known.step == step_; });
}

void DevicePlan::set(size_t number, const void* gradient, const DeviceSetting& setting, bool has_gradient, int slots) {
  const auto [b, position] = where_[number];
  Bucket& bucket = buckets_[b];
  const auto same = [&](const DeviceSetting& other) { return std::memcmp(&other, &setting, sizeof setting) == 0; };
  auto known = std::find_if(settings_.rbegin(), settings_.rend(), same);  // most often that of the tensor before
  if (known == settings_.rend()) {
    if (settings_.size() > setting_mask) throw std::length_error("fastopt: more than 16,384 settings in one step");
    settings_.push_back(setting);
    known = settings_.rbegin();
  }
  const auto code = static_cast<uint16_t>((settings_.rend() - known - 1) | present | (has_gradient ? stepped : 0));
  bucket.gradients[position] = gradient;
  bucket.codes[position] = codes_[bucket.first_counted + position] = code;
  if (!has_gradient) use(bucket, setting.setting.chains[static_cast<int>(Way::pull)], slots - 1);
  for (int way = 0; has_gradient && way < static_cast<int>(Way::pull); ++way)
    use(bucket, setting.setting.chains[way], 0);
}

void DevicePlan::launch(void* stream, const float* found_inf, const float* grad_scale) {
  launches_ = 0;
  if (!driver_) return;
  make_rows(stream, found_inf);
  for (const Part& part : parts_) launch(part, stream, found_inf, grad_scale);
}

// One row for each counted tensor, in as many launches as the codes and the settings they name need.
void DevicePlan::make_rows(void* stream, const float* found_inf) {
  if (settings_.empty()) return;
  std::vector<uint16_t>&local = local_settings_, &used = used_settings_;
  local.resize(settings_.size());
  for (size_t at = 0; at < codes_.size();) {
    std::fill(local.begin(), local.end(), setting_mask);
    used.clear();
    size_t next = at;
    for (; next < codes_.size(); ++next) {
      const uint16_t setting = codes_[next] & setting_mask;
      const bool is_new = (codes_[next] & present) && local[setting] == setting_mask;
      const size_t settings_at = round_up((next - at + 1) * sizeof(uint16_t), alignment);
      if (settings_at + (used.size() + is_new) * sizeof(DeviceSetting) > sizeof rows_arguments_.payload) break;
      if (!is_new) continue;
      local[setting] = static_cast<uint16_t>(used.size());
      used.push_back(setting);
    }
    const auto count = static_cast<uint32_t>(next - at);
    const size_t settings_at = round_up(count * sizeof(uint16_t), alignment);
    unsigned char* const payload = rows_arguments_.payload;
    for (size_t i = 0; i < count; ++i) {
      uint16_t code = codes_[at + i];
      if (code & present) code = static_cast<uint16_t>((code & ~setting_mask) | local[code & setting_mask]);
      std::memcpy(payload + i * sizeof code, &code, sizeof code);
    }
    for (size_t k = 0; k < used.size(); ++k)
      std::memcpy(payload + settings_at + k * sizeof(DeviceSetting), &settings_[used[k]], sizeof(DeviceSetting));
    rows_arguments_.header = {device_counters_,
                              device_rows_,
                              found_inf,
                              count,
                              static_cast<uint32_t>(at),
                              static_cast<uint32_t>(settings_at)};
    const bool small = settings_at + used.size() * sizeof(DeviceSetting) <= sizeof(RowsArguments<0>::payload);
    driver_->make_rows({device_, stream}, {small ? 0 : 1, &rows_arguments_, count});
    ++launches_;
    at = next;
  }
}

// Whether a tensor goes into a launch of this chain. Where rows are made on the device, the kernel has the last word.
bool DevicePlan::takes(const Bucket& bucket, size_t at, ChainUse use) const {
  if (!bucket.counted) return bucket.rows[at] != no_row && rows_[bucket.rows[at]].use == use;
  const uint16_t code = bucket.codes[at];
  return (code & present) && !(code & stepped) == is_in(use.chain, Chains{}, List<Pull>{});
}

std::vector<DevicePlan::ChainUse> DevicePlan::uses(const Bucket& bucket) const {
  if (bucket.counted) return bucket.counted_uses;
  std::vector<ChainUse> found;
  for (const StepRow& row : rows_)
    if (std::find(found.begin(), found.end(), row.use) == found.end()) found.push_back(row.use);
  return found;
}

std::vector<DevicePlan::Taken> DevicePlan::taken() const {
  const Bucket& bucket = buckets_.at(0);
  std::vector<Taken> found;
  std::vector<int32_t> number_of(rows_.size());
  for (const ChainUse& use : uses(bucket)) {
    Taken& one = found.emplace_back(Taken{use.chain, use.first_slot, {}, {}, {}});
    int32_t count = 0;
    for (size_t k = 0; k < rows_.size(); ++k) {
      const Row& row = *rows_[k].row;
      number_of[k] = rows_[k].use == use ? count++ : -1;
      if (number_of[k] < 0) continue;
      one.f32.insert(one.f32.end(), row.f32, row.f32 + row.count);
      one.f64.insert(one.f64.end(), row.f64, row.f64 + row.count);
    }
    for (const uint32_t row : bucket.rows) one.numbers.push_back(row == no_row ? -1 : number_of[row]);
  }
  return found;
}

void DevicePlan::pack() {
  if (packed_ || !driver_) return;
  parts_.clear();
  for (const Bucket& bucket : buckets_)
    for (const ChainUse& use : uses(bucket))
      for (size_t at = 0; at < bucket.entries.size();) at = pack_part(bucket, at, use);
  packed_ = true;
}

// Packs the tensors from `at` on that take a chain into one launch, as many as fit; returns where the next begins.
size_t DevicePlan::pack_part(const Bucket& bucket, size_t at, ChainUse use) {
  const size_t end = bucket.entries.size();
  while (at < end && !takes(bucket, at, use)) ++at;
  if (at == end) return end;

  if (bucket.centralise && !is_in(use.chain, Chains{}, Centralised{}))
    throw std::logic_error("fastopt: a chain was not compiled for centralised gradients: see csrc/chains.h");
  const size_t room = payload_bytes[bucket.any() ? 0 : tiers - 1], row_bytes = bytes_of_row(use.chain, bucket.wide());
  Part part{&bucket, use, at, 0, true, {}, {}};
  std::vector<uint32_t>& rows = part.rows;
  number_of_.assign(rows_.size(), absent_number);
  size_t next = at, last = at;
  for (; next < end; ++next) {
    const bool taken = takes(bucket, next, use);
    const uint32_t row = taken ? bucket.rows[next] : no_row;
    const bool is_new = row != no_row && number_of_[row] == absent_number;
    if (PayloadShape(next - at + 1, rows.size() + is_new, row_bytes).bytes > room) break;
    if (is_new) {
      number_of_[row] = static_cast<uint16_t>(rows.size());
      rows.push_back(row);
    }
    part.numbers.push_back(!taken ? absent_number : row == no_row ? 0 : number_of_[row]);
    if (taken) last = next;
  }
  part.tensors = last + 1 - at;
  part.numbers.resize(part.tensors);
  part.all = std::find(part.numbers.begin(), part.numbers.end(), absent_number) == part.numbers.end();
  const bool empty = bucket.first_item[at] == bucket.first_item[last + 1];  // nothing but empty tensors
  if (!empty) parts_.push_back(std::move(part));
  return next;
}

void DevicePlan::launch(const Part& part, void* stream, const float* found_inf, const float* grad_scale) {
  const Bucket& bucket = *part.bucket;
  const size_t row_bytes = bytes_of_row(part.use.chain, bucket.wide());
  const PayloadShape shape(part.tensors, part.rows.size(), row_bytes);
  unsigned char* const payload = arguments_.payload;
  std::memcpy(payload, bucket.gradients.data() + part.at, part.tensors * sizeof(void*));
  for (size_t i = 0; !part.all && i < part.tensors; ++i)
    if (part.numbers[i] == absent_number) std::memset(payload + i * sizeof(void*), 0, sizeof(void*));
  std::memcpy(payload + shape.indices_at, part.numbers.data(), part.tensors * sizeof(uint16_t));
  for (size_t k = 0; k < part.rows.size(); ++k) {
    const Row& row = *rows_[part.rows[k]].row;
    std::memcpy(payload + shape.rows_at + k * row_bytes, bucket.wide() ? static_cast<const void*>(row.f64) : row.f32,
                row_bytes);
  }

  LaunchHeader header{};
  header.table = bucket.table;
  header.rows = bucket.counted ? device_rows_ + bucket.first_counted : nullptr;
  header.found_inf = found_inf;
  header.grad_scale = is_in(part.use.chain, Chains{}, List<Pull>{}) ? nullptr : grad_scale;
  header.first_tensor = static_cast<uint32_t>(part.at);
  header.together = static_cast<uint16_t>(dealt_together * at_once(bucket.mix) * vectors);
  header.row_bits = static_cast<uint16_t>(row_bits_);
  header.indices_at = static_cast<uint32_t>(shape.indices_at);
  header.rows_at = static_cast<uint32_t>(shape.rows_at);
  header.chain = part.use.chain;
  header.first_slot = part.use.first_slot;
  const auto run = [&](const WorkItem* items, const std::vector<size_t>& first, auto kernel) {
    header.items = items + first[part.at];
    header.item_count = static_cast<uint32_t>(first[part.at + part.tensors] - first[part.at]);
    if (header.item_count == 0) return;
    arguments_.header = header;
    // The header is the same size in every tier and the payload follows it, so a smaller one is the larger one cut off.
    kernel(Launch{shape.bytes <= payload_bytes[0] ? 0 : 1, &arguments_, header.item_count});
    ++launches_;
  };
  const Target target{device_, stream};
  if (bucket.centralise)
    run(bucket.device_sums, bucket.first_sum,
        [&](const Launch& launch) { driver_->sum_rows(target, launch, bucket.wide()); });
  run(bucket.device_items, bucket.first_item,
      [&](const Launch& launch) { driver_->update(target, launch, bucket.mix, part.use.chain, bucket.centralise); });
}

}  // namespace fastopt
