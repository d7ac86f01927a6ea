// Sends HTTP requests to 127.0.0.1 in an open or a closed loop and records each of them.
//
//     gcc -O2 -o load_generator load_generator.c -lm
//     load_generator --port 8000 --rate 500 --seconds 4 --records records.csv request.http
//
// A generator in Python saturates a core before the server does, and then measures itself. This one uses 10 to 60 µs of
// CPU for each request, and its records show how late it was itself.
//
// Open loop (--rate): arrivals do not wait for responses. A request uses the connection that became idle last, and opens
// one if none is idle. With --reconnect, each request opens a connection and closes it after the response.
// Closed loop (no --rate): each of --connections clients sends its next request when it has the response.
//
// Each file contains one complete HTTP/1.1 request, head and body. The files are sent in turn.
// The records are lines of planned,sent,ended,status, with times in seconds since the end of the warm-up.
// "sent" is when the generator began with the request, before it opened a connection for it.
// The status is that of HTTP, or one of those below. A summary in JSON is printed to standard output.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { GAVE_UP = 0, CONNECTION_LOST = -1, NOT_CONNECTED = -2 }; // instead of an HTTP status

enum { MAX_HEAD = 16384, MAX_EVENTS = 512, MAX_BURST = 64 };
static const double MAX_WAIT_SECONDS = 0.05;

typedef struct {
    char *bytes;
    size_t length;
} Request;

typedef struct {
    double planned, sent, ended;
    int status;
} Record;

typedef enum { CONNECTING, IDLE, BUSY } State;

typedef struct Connection {
    int fd;
    State state;
    struct Connection *previous, *next; // in the list of idle or of pending connections
    const Request *request;             // NULL: opened before the first arrival, without a request
    bool waits_for_write;
    size_t bytes_sent;
    double planned, sent;
    // the response
    char head[MAX_HEAD];
    size_t head_length;
    bool head_complete;
    long body_left; // bytes
    int status;
    bool closes; // the server closes the connection after the response
} Connection;

static struct {
    int port;
    double rate;     // arrivals per second; 0: closed loop
    int connections; // closed loop: clients; open loop: connections opened before the first arrival
    bool reconnect, uniform;
    double warm_up, seconds, give_up;
    uint64_t seed;
    const char *records;
} options = {.connections = 1, .seconds = 5, .give_up = 5, .seed = 1};

static Request *requests;
static int request_count, next_request;
static Record *records;
static size_t record_count, record_capacity;
static Connection idle, pending; // heads of circular lists; pending is ordered by the time of sending
static size_t pending_count, connections_opened;
static int poller;
static double measured_from, measured_until; // seconds, monotonic clock

static void fail(const char *message) {
    fprintf(stderr, "load_generator: %s\n", message);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static double cpu_seconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

// Time until the next arrival: exponential for Poisson arrivals. Random numbers by xorshift64* (Marsaglia 2003, Vigna 2016).
static double next_interval(void) {
    if (options.uniform) return 1 / options.rate;
    static uint64_t state;
    if (state == 0) state = options.seed * 0x9E3779B97F4A7C15u | 1;
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    double uniform = ((state * 0x2545F4914F6CDD1Du >> 11) + 0.5) / 9007199254740992.0; // in (0, 1)
    return -log(uniform) / options.rate;
}

static void *allocate(void *old, size_t size) {
    void *memory = realloc(old, size);
    if (memory == NULL) fail("out of memory");
    return memory;
}

// --- Lists -----------------------------------------------------------------------------------------------------------

static void append(Connection *list, Connection *connection) {
    connection->previous = list->previous, connection->next = list;
    list->previous->next = connection, list->previous = connection;
}

static void unlink_connection(Connection *connection) {
    connection->previous->next = connection->next, connection->next->previous = connection->previous;
}

// --- Connections -----------------------------------------------------------------------------------------------------

static void watch(Connection *connection, bool write) {
    if (connection->waits_for_write == write) return;
    struct epoll_event event = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = connection};
    epoll_ctl(poller, EPOLL_CTL_MOD, connection->fd, &event);
    connection->waits_for_write = write;
}

// Returns NULL if the connection fails at once.
static Connection *open_connection(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return NULL;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(options.port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        close(fd);
        return NULL;
    }
    Connection *connection = allocate(NULL, sizeof *connection);
    connection->fd = fd, connection->state = CONNECTING, connection->request = NULL;
    connection->waits_for_write = true;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = connection};
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    connections_opened++;
    return connection;
}

static void close_connection(Connection *connection) {
    close(connection->fd);
    free(connection);
}

static void make_idle(Connection *connection) {
    connection->state = IDLE, connection->request = NULL;
    append(&idle, connection);
}

// --- One request -----------------------------------------------------------------------------------------------------

static void start_request(double planned);

static void record(double planned, double sent, int status) {
    if (record_count == record_capacity) {
        record_capacity = record_capacity ? 2 * record_capacity : 65536;
        records = allocate(records, record_capacity * sizeof *records);
    }
    records[record_count++] = (Record){planned, sent, now(), status};
}

static bool keeps_sending(void) { return options.rate == 0 && now() < measured_until; }

// Ends the request. The connection is reused only if both sides kept it and the request was sent completely.
static void end_request(Connection *connection, int status, bool reusable) {
    unlink_connection(connection);
    pending_count--;
    record(connection->planned, connection->sent, status);
    if (reusable && !options.reconnect)
        make_idle(connection);
    else
        close_connection(connection);
    if (keeps_sending() && status != NOT_CONNECTED) start_request(now());
}

static bool is_sent(const Connection *connection) { return connection->bytes_sent == connection->request->length; }

static void send_request(Connection *connection) {
    while (!is_sent(connection)) {
        const Request *request = connection->request;
        size_t left = request->length - connection->bytes_sent;
        ssize_t sent = send(connection->fd, request->bytes + connection->bytes_sent, left, MSG_NOSIGNAL);
        if (sent >= 0) {
            connection->bytes_sent += sent;
        } else if (errno == EAGAIN) {
            watch(connection, true);
            return;
        } else { // The server closed its side. There may be a response to read nevertheless.
            connection->bytes_sent = request->length;
            connection->closes = true;
        }
    }
    watch(connection, false);
}

static void begin_request(Connection *connection) {
    connection->state = BUSY;
    connection->bytes_sent = connection->head_length = 0;
    connection->head_complete = connection->closes = false;
    connection->body_left = 0;
    send_request(connection);
}

static void start_request(double planned) {
    double sent = now();
    bool reuses = idle.previous != &idle;
    Connection *connection = reuses ? idle.previous : open_connection(); // the one that became idle last
    if (connection == NULL) {
        record(planned, sent, NOT_CONNECTED);
        return;
    }
    if (reuses) unlink_connection(connection);
    connection->request = &requests[next_request++ % request_count];
    connection->planned = planned, connection->sent = sent;
    append(&pending, connection);
    pending_count++;
    if (reuses) begin_request(connection); // otherwise when it is connected
}

// --- The response ----------------------------------------------------------------------------------------------------

static bool has_name(const char *line, const char *name) { return strncasecmp(line, name, strlen(name)) == 0; }

static void read_head(Connection *connection) {
    connection->status = atoi(connection->head + strlen("HTTP/1.1 "));
    long length = -1;
    for (char *line = strstr(connection->head, "\r\n"); line != NULL; line = strstr(line, "\r\n")) {
        line += 2;
        if (has_name(line, "Content-Length:")) length = atol(line + strlen("Content-Length:"));
        if (has_name(line, "Connection: close")) connection->closes = true;
    }
    if (length < 0) fail("a response has no Content-Length");
    connection->body_left = length;
    connection->head_complete = true;
}

// Takes received bytes. Returns whether the response is complete.
static bool take(Connection *connection, const char *bytes, size_t count) {
    if (!connection->head_complete) {
        size_t before = connection->head_length, room = MAX_HEAD - 1 - before;
        size_t copied = count < room ? count : room;
        memcpy(connection->head + before, bytes, copied);
        connection->head_length += copied;
        connection->head[connection->head_length] = 0;
        char *end = strstr(connection->head, "\r\n\r\n");
        if (end == NULL && copied < count) fail("a response has a head of more than 16 KB");
        if (end == NULL) return false;
        size_t head_bytes = end + 4 - connection->head;
        end[2] = 0; // the body, if any, is not part of the head
        read_head(connection);
        count -= head_bytes - before;
    }
    connection->body_left -= count;
    return connection->body_left <= 0;
}

static void on_readable(Connection *connection) {
    static char buffer[65536];
    ssize_t count = recv(connection->fd, buffer, sizeof buffer, 0);
    if (count < 0 && errno == EAGAIN) return;
    if (connection->state == IDLE) { // the server closed a connection without a request
        unlink_connection(connection);
        close_connection(connection);
    } else if (count <= 0) {
        end_request(connection, CONNECTION_LOST, false);
    } else if (take(connection, buffer, count)) {
        // A response may arrive before the request is sent completely. Its sending is not continued.
        end_request(connection, connection->status, is_sent(connection) && !connection->closes);
    }
}

static void on_connected(Connection *connection, bool failed) {
    if (failed && connection->request == NULL) fail("the server does not accept connections");
    if (failed) {
        end_request(connection, NOT_CONNECTED, false);
    } else if (connection->request != NULL) {
        begin_request(connection);
    } else {
        watch(connection, false);
        make_idle(connection);
    }
}

static void on_event(Connection *connection, uint32_t events) {
    if (connection->state == CONNECTING) {
        on_connected(connection, events & (EPOLLERR | EPOLLHUP));
        return;
    }
    if (events & EPOLLOUT && connection->state == BUSY) send_request(connection);
    if (events & (EPOLLIN | EPOLLERR | EPOLLHUP)) on_readable(connection);
}

// --- The loop --------------------------------------------------------------------------------------------------------

// Waits until the moment at the latest, and handles what the connections have received.
static void poll_until(double moment) {
    struct epoll_event events[MAX_EVENTS];
    double wait = fmax(0, fmin(moment - now(), MAX_WAIT_SECONDS));
    struct timespec timeout = {0, (long)(wait * 1e9)};
    int count = epoll_pwait2(poller, events, MAX_EVENTS, &timeout, NULL);
    for (int i = 0; i < count; i++) on_event(events[i].data.ptr, events[i].events);
}

static void connect_all(void) {
    for (int i = 0; i < options.connections; i++)
        if (open_connection() == NULL) fail("the server does not accept connections");
    size_t connected = 0;
    while (connected < (size_t)options.connections) {
        poll_until(now() + MAX_WAIT_SECONDS);
        connected = 0;
        for (Connection *each = idle.next; each != &idle; each = each->next) connected++;
    }
}

static void print_summary(double cpu, double seconds) {
    printf("{\"requests\": %zu, \"connections_opened\": %zu, \"cpu_cores\": %.4f}\n", record_count, connections_opened,
           cpu / seconds);
}

static void run(void) {
    if (!options.reconnect) connect_all();
    double began = now();
    measured_from = began + options.warm_up, measured_until = measured_from + options.seconds;
    double arrival = options.rate ? began + next_interval() : INFINITY;
    for (int i = 0; i < options.connections && options.rate == 0; i++) start_request(began);
    double cpu_before = 0, cpu_after = 0;
    bool warm = false, measured = false;
    while (!measured || pending_count > 0) {
        double moment = now();
        if (!warm && moment >= measured_from) warm = true, cpu_before = cpu_seconds();
        if (!measured && moment >= measured_until) measured = true, cpu_after = cpu_seconds();
        for (int i = 0; i < MAX_BURST && arrival <= moment && arrival < measured_until; i++) {
            start_request(arrival);
            arrival += next_interval();
        }
        while (pending.next != &pending && pending.next->sent + options.give_up <= moment)
            end_request(pending.next, GAVE_UP, false);
        double next = fmin(arrival, pending.next != &pending ? pending.next->sent + options.give_up : INFINITY);
        poll_until(measured ? next : fmin(next, warm ? measured_until : measured_from));
    }
    print_summary(cpu_after - cpu_before, options.seconds);
}

// --- Files and options -----------------------------------------------------------------------------------------------

static Request read_request(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) fail(path);
    Request request = {NULL, 0};
    size_t count;
    do {
        request.bytes = allocate(request.bytes, request.length + 65536);
        count = fread(request.bytes + request.length, 1, 65536, file);
        request.length += count;
    } while (count > 0);
    fclose(file);
    if (request.length == 0) fail("a request file is empty");
    return request;
}

static void write_records(void) {
    FILE *file = fopen(options.records, "w");
    if (file == NULL) fail(options.records);
    fputs("planned,sent,ended,status\n", file);
    for (size_t i = 0; i < record_count; i++) {
        Record *each = &records[i];
        fprintf(file, "%.6f,%.6f,%.6f,%d\n", each->planned - measured_from, each->sent - measured_from,
                each->ended - measured_from, each->status);
    }
    if (fclose(file) != 0) fail(options.records);
}

static void read_options(int count, char **words) {
    enum { PORT, RATE, CONNECTIONS, RECONNECT, UNIFORM, WARM_UP, SECONDS, GIVE_UP, SEED, RECORDS };
    static const struct option known[] = {
        {"port", required_argument, NULL, PORT},
        {"rate", required_argument, NULL, RATE},
        {"connections", required_argument, NULL, CONNECTIONS},
        {"reconnect", no_argument, NULL, RECONNECT},
        {"uniform", no_argument, NULL, UNIFORM}, // arrivals at equal intervals instead of Poisson arrivals
        {"warm-up", required_argument, NULL, WARM_UP},
        {"seconds", required_argument, NULL, SECONDS},
        {"give-up", required_argument, NULL, GIVE_UP}, // seconds after which a request is given up
        {"seed", required_argument, NULL, SEED},
        {"records", required_argument, NULL, RECORDS},
        {0},
    };
    for (int name; (name = getopt_long(count, words, "", known, NULL)) != -1;) {
        switch (name) {
        case PORT: options.port = atoi(optarg); break;
        case RATE: options.rate = atof(optarg); break;
        case CONNECTIONS: options.connections = atoi(optarg); break;
        case RECONNECT: options.reconnect = true; break;
        case UNIFORM: options.uniform = true; break;
        case WARM_UP: options.warm_up = atof(optarg); break;
        case SECONDS: options.seconds = atof(optarg); break;
        case GIVE_UP: options.give_up = atof(optarg); break;
        case SEED: options.seed = strtoull(optarg, NULL, 10); break;
        case RECORDS: options.records = optarg; break;
        default: exit(2);
        }
    }
    request_count = count - optind;
    if (options.port <= 0 || options.records == NULL || request_count == 0)
        fail("--port, --records and at least one request file are required");
    if (options.rate < 0 || options.connections < 0 || options.seconds <= 0 || options.give_up <= 0)
        fail("--seconds and --give-up must be above 0, --rate and --connections not below 0");
    requests = allocate(NULL, request_count * sizeof *requests);
    for (int i = 0; i < request_count; i++) requests[i] = read_request(words[optind + i]);
}

int main(int count, char **words) {
    read_options(count, words);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0); // ns; by default, the kernel adds up to 50 µs to each wait
    setpriority(PRIO_PROCESS, 0, -10);       // clients elsewhere would not wait for a core; needs root, otherwise no effect
    idle.previous = idle.next = &idle, pending.previous = pending.next = &pending;
    poller = epoll_create1(EPOLL_CLOEXEC);
    run();
    write_records();
    return 0;
}
