// Streams, events, graphs and memory: device.h says what they are.
#include "device.h"

#include <dlfcn.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace fake_cuda {

namespace {

constexpr int kPoison = 0xFF;  // NaN in every floating type
constexpr size_t kAlignment = 512;

thread_local bool is_worker = false;
thread_local bool in_graph = false;  // the work that runs was captured
thread_local int capture_mode = 0;   // of this thread: cudaThreadExchangeStreamCaptureMode

using Lock = std::unique_lock<std::mutex>;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Lets other threads of Python run while this one waits: the worker may need the interpreter.
struct WithoutInterpreter {
  using Check = int();
  using Save = void*();
  using Restore = void(void*);
  void* state = nullptr;
  WithoutInterpreter() {
    static const auto initialized = reinterpret_cast<Check*>(dlsym(RTLD_DEFAULT, "Py_IsInitialized"));
    static const auto check = reinterpret_cast<Check*>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    static const auto save = reinterpret_cast<Save*>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    if (initialized && initialized() && check && check()) state = save();
  }
  ~WithoutInterpreter() {
    static const auto restore = reinterpret_cast<Restore*>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
    if (state) restore(state);
  }
};

void complain(Device& d, const std::string& what) {
  fprintf(stderr, "fake CUDA: %s\n", what.c_str());
  d.errors++;
  if (d.sticky == kSuccess) d.sticky = what.find("memory") != std::string::npos ? kIllegalAddress : kLaunchFailure;
}

// Runs the first item of a stream; what it waits for has been done. The lock is given up meanwhile.
void run_first(Device& d, Stream& stream, Lock& lock) {
  Item item = std::move(stream.queue.front());
  stream.queue.pop_front();
  std::string wrong;
  if (item.work && d.sticky == kSuccess) {
    lock.unlock();
    wrong = item.work();
    item.work = nullptr;
    lock.lock();
    d.items++;
  }
  if (!wrong.empty()) complain(d, wrong);
  stream.done++;
}

bool is_ready(const Stream& stream) {
  if (stream.queue.empty()) return false;
  for (const Point& p : stream.queue.front().after)
    if (p.stream->done < p.count) return false;
  return true;
}

// Runs up to `steps` items that could run, of streams drawn by lot.
void run_some(Device& d, unsigned steps, Lock& lock) {
  for (unsigned i = 0; i < steps; i++) {
    Stream& stream = *d.streams[d.random() % d.streams.size()];
    if (is_ready(stream)) run_first(d, stream, lock);
  }
}

void advance(Device& d, const Point& point, Lock& lock) {
  while (point.stream->done < point.count && !d.closed) {
    if (d.order == Order::kRandom) run_some(d, d.random() % 4, lock);
    if (point.stream->done >= point.count) return;
    const std::vector<Point> after = point.stream->queue.front().after;
    for (const Point& p : after) advance(d, p, lock);
    if (point.stream->done < point.count && is_ready(*point.stream)) run_first(d, *point.stream, lock);
  }
}

// The worker passes the point; the caller waits, or goes on at once.
void request(Device& d, const Point& point, Lock& lock, bool wait) {
  d.requests.push_back(point);
  d.wanted.notify_one();
  if (!wait) return;
  lock.unlock();
  {
    const WithoutInterpreter without;
    Lock again(d.mutex);
    d.passed.wait(again, [&] { return d.closed || point.stream->done >= point.count; });
  }
  lock.lock();
}

unsigned draw(unsigned below) {
  const Lock lock(device().mutex);
  return unsigned(device().random() % below);
}

int add_node(Stream& stream, Work work) {
  Graph& graph = *stream.capture;
  if (graph.error) return graph.error;
  graph.nodes.push_back({std::move(work), stream.tail});
  stream.tail = {graph.nodes.size() - 1};
  return kSuccess;
}

int invalidate(Graph& graph, int error) {
  if (!graph.error) graph.error = kCaptureInvalidated;
  return error;
}

}  // namespace

Device& device() {
  static Device& d = []() -> Device& {
    Device& made = *new Device;  // never destroyed: threads may still be there at the end
    const char* asked = getenv("FAKE_CUDA_ORDER");
    const std::string order = asked ? asked : "random";
    made.order = order == "late" ? Order::kLate : order == "early" ? Order::kEarly : Order::kRandom;
    if (const char* seed = getenv("FAKE_CUDA_SEED")) made.random.seed(unsigned(atoi(seed)));
    for (Stream*& stream : made.default_stream) {
      made.streams.push_back(std::make_unique<Stream>());
      stream = made.streams.back().get();
      stream->device = int(made.streams.size()) - 1;
    }
    return made;
  }();
  return d;
}

// ---- streams --------------------------------------------------------------------------------------------------------
Stream* new_stream(int number) {
  Device& d = device();
  const Lock lock(d.mutex);
  d.streams.push_back(std::make_unique<Stream>());
  d.streams.back()->device = number;
  return d.streams.back().get();
}

Stream* stream_of(void* handle, int current_device) {
  if (handle) return static_cast<Stream*>(handle);
  return device().default_stream[current_device];
}

int submit(Stream& stream, Work work, bool may_wait) {
  Device& d = device();
  Lock lock(d.mutex);
  if (d.closed) return kSuccess;
  if (d.sticky) return d.sticky;
  if (stream.capture) return add_node(stream, std::move(work));
  stream.queue.push_back({std::move(work), std::move(stream.waits)});
  stream.waits.clear();
  stream.submitted++;
  if (is_worker) return kSuccess;
  if (d.order == Order::kEarly && may_wait) request(d, {&stream, stream.submitted}, lock, true);
  if (d.order == Order::kRandom && d.random() % 8 == 0) {
    Stream& drawn = *d.streams[d.random() % d.streams.size()];
    if (const uint64_t left = drawn.submitted - drawn.done)
      request(d, {&drawn, drawn.done + 1 + d.random() % left}, lock, may_wait && d.random() % 2);
  }
  return kSuccess;
}

int record(Event& event, Stream& stream) {
  if (event.device != stream.device) return kInvalidHandle;
  const bool capturing = is_capturing(stream);
  if (!capturing)
    if (const int error = submit(stream, [time = event.time] { return *time = now(), std::string(); }, false))
      return error;
  Device& d = device();
  const Lock lock(d.mutex);
  event.capture = stream.capture;
  event.nodes = stream.tail;
  if (!capturing) event.point = {&stream, stream.submitted};
  return d.sticky;
}

int wait_event(Stream& stream, const Event& event) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (event.capture && std::find(d.captures.begin(), d.captures.end(), event.capture) != d.captures.end()) {
    if (stream.capture && stream.capture != event.capture) return kCaptureImplicit;
    if (!stream.capture) {
      stream.capture = event.capture, stream.tail.clear();
      event.capture->streams.push_back(&stream);
    }
    stream.tail.insert(stream.tail.end(), event.nodes.begin(), event.nodes.end());
  } else if (stream.capture) {
    if (event.point.stream) return invalidate(*stream.capture, kCaptureImplicit);
  } else if (event.point.stream && event.point.stream != &stream) {
    stream.waits.push_back(event.point);
  }
  return d.sticky;
}

int wait_until(const Point& point) {
  Device& d = device();
  Lock lock(d.mutex);
  if (point.stream && point.stream->capture) return invalidate(*point.stream->capture, kCaptureUnsupported);
  if (point.stream && point.stream->done < point.count && !is_worker && !d.closed) request(d, point, lock, true);
  return d.sticky;
}

bool passed(const Point& point) {
  Device& d = device();
  Lock lock(d.mutex);
  if (!point.stream || d.closed) return true;
  if (point.stream->done < point.count && d.random() % 4 == 0) request(d, point, lock, false);  // who asks for ever
  return point.stream->done >= point.count;
}

int synchronize_all(int number) {
  Device& d = device();
  std::vector<Point> points;
  {
    const Lock lock(d.mutex);
    for (const auto& stream : d.streams)
      if (stream->device == number && !stream->capture) points.push_back({stream.get(), stream->submitted});
    std::shuffle(points.begin(), points.end(), d.random);
  }
  int error = kSuccess;
  for (const Point& p : points)
    if (const int e = wait_until(p)) error = e;
  return error;
}

void work_forever() {
  is_worker = true;
  Device& d = device();
  Lock lock(d.mutex);
  d.has_worker = true;
  while (!d.closed) {
    d.wanted.wait(lock, [&] { return d.closed || !d.requests.empty(); });
    if (d.closed) break;
    const Point point = d.requests.front();
    d.requests.pop_front();
    advance(d, point, lock);
    d.passed.notify_all();
  }
  d.passed.notify_all();
}

// ---- graphs ---------------------------------------------------------------------------------------------------------
int begin_capture(Stream& stream, int mode) {
  Device& d = device();
  const Lock lock(d.mutex);
  for (const Stream* legacy : d.default_stream)
    if (&stream == legacy) return kCaptureUnsupported;
  if (stream.capture) return kCaptureUnsupported;
  auto graph = std::make_shared<Graph>();
  graph->id = d.next_capture++, graph->mode = mode, graph->streams = {&stream};
  stream.capture = graph, stream.tail.clear();
  d.captures.push_back(graph);
  return kSuccess;
}

int end_capture(Stream& stream, std::shared_ptr<Graph>* graph) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (!stream.capture) return kInvalidValue;
  *graph = stream.capture;
  std::erase(d.captures, *graph);
  int error = (*graph)->error;
  for (Stream* other : (*graph)->streams) {
    for (const size_t node : other->tail) {  // what nobody of the first stream waits for
      std::vector<bool> before((*graph)->nodes.size());
      std::vector<size_t> open = stream.tail;
      while (!open.empty()) {
        const size_t n = open.back();
        open.pop_back();
        if (before[n]) continue;
        before[n] = true;
        open.insert(open.end(), (*graph)->nodes[n].after.begin(), (*graph)->nodes[n].after.end());
      }
      if (!before[node] && !error) error = kCaptureUnjoined;
    }
  }
  for (Stream* other : (*graph)->streams) other->capture.reset(), other->waits.clear();
  return error;
}

int launch_graph(const std::shared_ptr<Graph>& graph, Stream& stream) {
  return submit(stream, [graph] {
    // One of the orders that are possible, drawn by lot.
    std::vector<bool> done(graph->nodes.size());
    for (size_t left = done.size(); left > 0; left--) {
      std::vector<size_t> ready;
      for (size_t n = 0; n < done.size() && ready.size() < 8; n++) {
        bool free = !done[n];
        for (const size_t before : graph->nodes[n].after) free = free && done[before];
        if (free) ready.push_back(n);
      }
      const size_t chosen = ready[draw(unsigned(ready.size()))];
      in_graph = true;
      const std::string wrong = graph->nodes[chosen].work();
      in_graph = false;
      if (!wrong.empty()) return wrong;
      done[chosen] = true;
    }
    return std::string();
  });
}

bool is_capturing(Stream& stream) {
  const Lock lock(device().mutex);
  return bool(stream.capture);
}

int forbidden_while_capturing() {
  Device& d = device();
  const Lock lock(d.mutex);
  if (is_worker || capture_mode == 2) return kSuccess;  // cudaStreamCaptureModeRelaxed
  for (const auto& graph : d.captures)
    if (graph->mode == 0) return invalidate(*graph, kCaptureUnsupported);
  return kSuccess;
}

int exchange_capture_mode(int mode) { return std::exchange(capture_mode, mode); }

// ---- memory ---------------------------------------------------------------------------------------------------------
void* allocate_segment(size_t bytes, int number) {
  void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (!memory) return nullptr;
  std::memset(memory, kPoison, bytes);
  Device& d = device();
  const Lock lock(d.mutex);
  d.segments[reinterpret_cast<uintptr_t>(memory)] = {bytes, number};
  return memory;
}

// The memory is never used again: work that uses it may be under way, and torch's allocator, which calls this with its
// lock held, may not wait for the worker.
int free_segment(void* memory) {
  if (!memory) return kSuccess;
  Device& d = device();
  const Lock lock(d.mutex);
  return d.segments.contains(reinterpret_cast<uintptr_t>(memory)) ? kSuccess : kInvalidValue;
}

void block_changes(bool given, int number, uintptr_t address, size_t bytes, void* handle) {
  Device& d = device();
  Stream& stream = *stream_of(handle, number);
  auto mark = [&d, given, number, address, bytes] {
    const Lock lock(d.mutex);
    auto next = d.blocks.lower_bound(address);
    while (next != d.blocks.end() && next->first < address + bytes) next = d.blocks.erase(next);
    if (given) d.blocks[address] = {bytes, number};
  };
  auto poison = [address, bytes] { std::memset(reinterpret_cast<void*>(address), kPoison, bytes); };
  // Memory of a graph is its own from the capture on, also while it is not replayed.
  if (is_capturing(stream)) {
    if (given) mark();
    submit(stream, [poison] { return poison(), std::string(); }, false);
  } else {
    submit(stream, [mark, poison] { return mark(), poison(), std::string(); }, false);
  }
}

bool on_device(uintptr_t address, int* number) {
  Device& d = device();
  const Lock lock(d.mutex);
  auto next = d.segments.upper_bound(address);
  if (next == d.segments.begin()) return false;
  --next;
  if (address >= next->first + next->second.bytes) return false;
  if (number) *number = next->second.device;
  return true;
}

bool is_pinned(uintptr_t address) {
  Device& d = device();
  const Lock lock(d.mutex);
  auto next = d.pinned.upper_bound(address);
  return next != d.pinned.begin() && address < std::prev(next)->first + std::prev(next)->second;
}

std::string complaint(int number, uintptr_t address, size_t bytes) {
  Device& d = device();
  int owner = number;
  if (!on_device(address, &owner)) return "memory of the host, or of nobody";
  if (owner != number) return "memory of cuda:" + std::to_string(owner) + " on cuda:" + std::to_string(number);
  if (in_graph) return "";  // its memory is its own, whatever became of the tensors
  const Lock lock(d.mutex);
  auto next = d.blocks.upper_bound(address);
  if (next == d.blocks.begin()) return "memory that nobody was given";
  --next;
  if (address > next->first + next->second.bytes) return "memory that was freed, or is not given yet";
  if (address + bytes > next->first + next->second.bytes && bytes) return "memory behind the end of a block";
  return "";
}

}  // namespace fake_cuda
