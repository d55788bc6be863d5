// Two devices that are not there: streams whose work is put off, events, graphs, and memory that knows who may use it.
//
// A stream is a queue of items. Nothing of it happens when it is submitted, but when somebody waits, and then no more
// than has to: what was waited for, and what that waits for itself. The order of everything else is the worst that
// CUDA allows (Order). One thread, the worker, runs all items; the threads of the program submit and wait.
//
// Every function may be called from any thread; `mutex` guards all fields.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace fake_cuda {

constexpr int kDevices = 2;

// Errors of CUDA that are used here, by their numbers.
enum Error : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidDevice = 101,
  kInvalidHandle = 400,
  kNotReady = 600,
  kIllegalAddress = 700,
  kLaunchFailure = 719,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCaptureUnjoined = 904,
  kCaptureImplicit = 906,
};

// When work that nobody waits for is done.
enum class Order {
  kLate,    // never, unless somebody waits
  kRandom,  // now and then, of a stream drawn by lot
  kEarly,   // at once: what a program does that waits after every line
};

using Work = std::function<std::string()>;  // says what went wrong, or nothing

struct Stream;

// A place in a stream: everything up to item number `count`.
struct Point {
  Stream* stream = nullptr;
  uint64_t count = 0;
};

struct Item {
  Work work;
  std::vector<Point> after;  // of other streams
};

// What is captured: nodes in an order that is possible, each with those it has to wait for.
struct Node {
  Work work;
  std::vector<size_t> after;
};
struct Graph {
  std::vector<Node> nodes;
  std::vector<Stream*> streams;  // that take part in the capture
  unsigned long long id = 0;
  int mode = 0;  // cudaStreamCaptureMode
  int error = kSuccess;
};

struct Stream {
  int device = 0;
  std::deque<Item> queue;
  std::vector<Point> waits;  // of the next item
  uint64_t submitted = 0, done = 0;
  std::shared_ptr<Graph> capture;
  std::vector<size_t> tail;  // nodes that the next one of this stream has to wait for
};

struct Event {
  int device = 0;
  Point point;
  std::shared_ptr<double> time = std::make_shared<double>(0);  // when the point was passed
  std::shared_ptr<Graph> capture;
  std::vector<size_t> nodes;
};

struct Block {
  size_t bytes;
  int device;
};

struct Device {
  std::mutex mutex;
  std::condition_variable wanted, passed;
  Order order = Order::kRandom;
  std::mt19937 random{1};
  std::vector<std::unique_ptr<Stream>> streams;
  Stream* default_stream[kDevices];
  std::deque<Point> requests;
  bool closed = false;  // the program ends: nothing is run any more
  bool has_worker = false;
  int sticky = kSuccess;
  std::vector<std::shared_ptr<Graph>> captures;  // that are under way
  unsigned long long next_capture = 1;
  std::map<uintptr_t, Block> segments;  // of cudaMalloc
  std::map<uintptr_t, size_t> pinned;   // of cudaHostAlloc
  std::map<uintptr_t, Block> blocks;    // what the allocator of torch has given away, in the order of the streams
  long items = 0, errors = 0;
};

Device& device();

// ---- streams ----
Stream* new_stream(int device);
Stream* stream_of(void* handle, int current_device);  // null: the default stream of the current device
// may_wait: the caller holds no lock that another thread could want who has the interpreter, which the worker may need.
int submit(Stream& stream, Work work, bool may_wait = true);
int record(Event& event, Stream& stream);
int wait_event(Stream& stream, const Event& event);
int wait_until(const Point& point);  // runs what has to be run
bool passed(const Point& point);
int synchronize_all(int device);
void work_forever();  // the worker

// ---- graphs ----
int begin_capture(Stream& stream, int mode);
int end_capture(Stream& stream, std::shared_ptr<Graph>* graph);
int launch_graph(const std::shared_ptr<Graph>& graph, Stream& stream);
// Whether the stream takes part in a capture, in which work happens at the replay.
bool is_capturing(Stream& stream);
int forbidden_while_capturing();  // an error if a capture of this process forbids calls that wait or allocate
int exchange_capture_mode(int mode);

// ---- memory ----
void* allocate_segment(size_t bytes, int device);
int free_segment(void* memory);
// The allocator of torch gives away or takes back [address, address + bytes): it is poisoned, in the order of a stream.
void block_changes(bool given, int device, uintptr_t address, size_t bytes, void* stream);
// "", or why work of `device` may not touch [address, address + bytes). Called by the worker.
std::string complaint(int device, uintptr_t address, size_t bytes);
bool on_device(uintptr_t address, int* device = nullptr);
bool is_pinned(uintptr_t address);

}  // namespace fake_cuda
