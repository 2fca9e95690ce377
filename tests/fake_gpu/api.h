/* What every function of the API begins and ends with. */
#ifndef FAKE_API_H
#define FAKE_API_H
#include "driver.h"

enum needs { NOTHING, INITIALISED, CONTEXT };
extern __thread context *current;
CUresult enter(const char *name, enum needs needs); /* the lock is held when it returns 0, and free otherwise */
CUresult refuse(CUresult code);                     /* lets the lock go */
void end_handles_of(context *owner);

#define ENTER(needs)                                                                                                   \
    do {                                                                                                               \
        CUresult entered = enter(__func__, needs);                                                                     \
        if (entered) return entered;                                                                                   \
    } while (0)
#define LEAVE(code) return refuse(code)
#define REQUIRE(condition, code)                                                                                       \
    do {                                                                                                               \
        if (!(condition)) LEAVE(code);                                                                                 \
    } while (0)
#endif
