/* A CUDA runtime and driver in the host's memory, for tests.
 *
 * What is put on a stream happens when somebody waits for the stream, not before, so that a missing wait shows. It
 * counts what is alive, has as much memory as it is told, and fails where it is told to. An error stays until
 * cudaGetLastError is called, as CUDA's does.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MEMORY, HOST, STREAM, EVENT, GRAPH, EXECUTABLE, KINDS };
enum { OPERATIONS = 64 };

typedef void (*Work)(void *);
typedef struct Operation { int what; void *to, *from; size_t size; Work work; } Operation;
typedef struct Queue { int count, capturing, broken; Operation items[OPERATIONS]; struct Queue *recorded; } Queue;
typedef struct { size_t size; int kind; } Block;
typedef struct { long tick; } Event;

static int live[KINDS], last_error, devices = 1, no_device_code, fail_code, fail_after;
static int integrated = 0, major = 8, minor = 7, runtime = 12060, driver = 12060;
static char fail_in[64];
static size_t used, limit = (size_t)1 << 40;
static long tick, copies;
static Block *blocks[4096];

static int result(int code) { if (code) last_error = code; return code; }

static int fails(const char *name) {
    if (!devices && strcmp(name, "cudaRuntimeGetVersion")) return result(no_device_code);
    if (strcmp(name, fail_in)) return 0;
    if (fail_after-- > 0) return 0;
    fail_in[0] = 0;
    return result(fail_code);
}
#define CALL do { int code = fails(__func__); if (code) return code; } while (0)

/* What tests turn. */
void fake_reset(void) {
    devices = 1; fail_in[0] = 0; limit = (size_t)1 << 40; integrated = 0; major = 8; minor = 7; last_error = 0;
    copies = 0; runtime = driver = 12060;
}
void fake_devices(int count, int code) { devices = count; no_device_code = code; }
void fake_gpu(int is_integrated, int capability_major, int capability_minor) {
    integrated = is_integrated; major = capability_major; minor = capability_minor;
}
void fake_fail(const char *name, int code, int after) {
    snprintf(fail_in, sizeof fail_in, "%s", name); fail_code = code; fail_after = after;
}
void fake_limit(size_t bytes) { limit = bytes; }
int fake_live(int kind) { return live[kind]; }
int fake_last_error(void) { return last_error; }
long fake_copies(void) { return copies; }
size_t fake_used(void) { return used; }

/* The driver. */
int cuInit(unsigned flags) { return devices ? 0 : 100; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Fake GPU"); return 0; }

/* Devices. */
int cudaGetLastError(void) { int code = last_error; last_error = 0; return code; }
const char *cudaGetErrorString(int code) {
    switch (code) {
    case 1: return "invalid argument";
    case 2: return "out of memory";
    case 35: return "CUDA driver version is insufficient for CUDA runtime version";
    case 700: return "an illegal memory access was encountered";
    case 900: return "operation not permitted when stream is capturing";
    default: return "some other error";
    }
}
int cudaGetDeviceCount(int *count) { CALL; *count = devices; return 0; }
int cudaRuntimeGetVersion(int *version) { CALL; *version = runtime; return 0; }
int cudaDriverGetVersion(int *version) { CALL; *version = driver; return 0; }
int cudaDeviceGetAttribute(int *value, int which, int device) {
    CALL;
    switch (which) {
    case 16: *value = 16; return 0;
    case 18: *value = integrated; return 0;
    case 75: *value = major; return 0;
    case 76: *value = minor; return 0;
    default: return result(1);
    }
}

/* Memory. Blocks are remembered, so that a pointer that is none of them is refused, and not freed twice. */
static int take(void **to, size_t size, int kind) {
    if (used + size > limit) return result(2);
    for (int i = 0; i < 4096; i++) {
        if (blocks[i]) continue;
        blocks[i] = malloc(sizeof(Block) + 256 + size);
        blocks[i]->size = size; blocks[i]->kind = kind;
        used += size; live[kind]++;
        *to = (char *)blocks[i] + 256;
        memset(*to, 0xA5, size);
        return 0;
    }
    return result(2);
}
static int give(void *from, int kind) {
    if (!from) return 0;
    for (int i = 0; i < 4096; i++) {
        if (!blocks[i] || (char *)blocks[i] + 256 != from || blocks[i]->kind != kind) continue;
        used -= blocks[i]->size; live[kind]--;
        free(blocks[i]); blocks[i] = NULL;
        return 0;
    }
    return result(1);
}
int cudaMalloc(void **to, size_t size) { CALL; return take(to, size, MEMORY); }
int cudaFree(void *from) { CALL; return give(from, MEMORY); }
int cudaHostAlloc(void **to, size_t size, unsigned flags) { CALL; return take(to, size, HOST); }
int cudaFreeHost(void *from) { CALL; return give(from, HOST); }
int cudaHostGetDevicePointer(void **to, void *host, unsigned flags) { CALL; *to = host; return 0; }

/* Streams. */
static int put(Queue *queue, Operation operation) {
    Queue *to = queue->capturing ? queue->recorded : queue;
    if (to->count == OPERATIONS) return result(1);
    to->items[to->count++] = operation;
    return 0;
}
static void perform(Queue *queue) {
    for (int i = 0; i < queue->count; i++) {
        Operation *one = &queue->items[i];
        tick++;
        if (one->what == 0) { memcpy(one->to, one->from, one->size); copies++; }
        if (one->what == 1) one->work(one->from);
        if (one->what == 2) ((Event *)one->to)->tick = tick;
        if (one->what == 3) perform(one->to);
    }
}
int cudaStreamCreateWithFlags(void **to, unsigned flags) { CALL; *to = calloc(1, sizeof(Queue)); live[STREAM]++; return 0; }
int cudaStreamDestroy(void *stream) { CALL; live[STREAM]--; free(stream); return 0; }
int cudaStreamSynchronize(void *stream) {
    Queue *queue = stream;
    if (queue->capturing) { queue->broken = 1; return result(900); }
    CALL;
    perform(queue); queue->count = 0;
    return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    CALL;
    return put(stream, (Operation){.what = 0, .to = to, .from = (void *)from, .size = size});
}
int cudaLaunchHostFunc(void *stream, Work work, void *data) {
    CALL;
    return put(stream, (Operation){.what = 1, .from = data, .work = work});
}

/* Events: half a millisecond for each operation. */
int cudaEventCreateWithFlags(void **to, unsigned flags) { CALL; *to = calloc(1, sizeof(Event)); live[EVENT]++; return 0; }
int cudaEventDestroy(void *event) { CALL; live[EVENT]--; free(event); return 0; }
int cudaEventRecord(void *event, void *stream) { CALL; return put(stream, (Operation){.what = 2, .to = event}); }
int cudaEventElapsedTime(float *ms, void *start, void *end) {
    CALL;
    if (!((Event *)start)->tick || !((Event *)end)->tick) return result(600);
    *ms = 0.5f * (((Event *)end)->tick - ((Event *)start)->tick);
    return 0;
}

/* Graphs. */
int cudaStreamBeginCapture(void *stream, int mode) {
    CALL;
    Queue *queue = stream;
    if (queue->capturing) return result(900);
    queue->capturing = 1; queue->broken = 0; queue->recorded = calloc(1, sizeof(Queue));
    return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
    Queue *queue = stream;
    int code = fails(__func__);
    queue->capturing = 0;
    *graph = NULL;
    if (code || queue->broken) { free(queue->recorded); return code ? code : result(901); }
    *graph = queue->recorded; live[GRAPH]++;
    return 0;
}
int cudaGraphInstantiateWithFlags(void **to, void *graph, unsigned long long flags) {
    CALL;
    *to = malloc(sizeof(Queue)); memcpy(*to, graph, sizeof(Queue)); live[EXECUTABLE]++;
    return 0;
}
int cudaGraphLaunch(void *executable, void *stream) { CALL; return put(stream, (Operation){.what = 3, .to = executable}); }
int cudaGraphDestroy(void *graph) { CALL; live[GRAPH]--; free(graph); return 0; }
int cudaGraphExecDestroy(void *executable) { CALL; live[EXECUTABLE]--; free(executable); return 0; }
