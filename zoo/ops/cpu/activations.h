#pragma once

/* GELU and sigmoid, exact to rounding, written so that the compiler vectorises them. */

#include "vectors.h"

/* Normal cdf Phi(x), exact to rounding: Phi(x) - 1/2 is x times a rational function of x^2, fitted on |x| <= 5.5 with
   an error of at most 7e-9. */
static inline float normal_cdf(float x) {
    float z = x > 5.5f ? 5.5f : x;
    z = z < -5.5f ? -5.5f : z;
    float t = z * z;
    float over = ((((2.274945908e-08f * t + 6.352118800e-06f) * t + 1.688252634e-04f) * t + 4.677257990e-03f) * t + 3.385260226e-02f) * t + 3.989422346e-01f;
    float under = ((((1.197506779e-06f * t + 7.364739407e-05f) * t + 1.884442378e-03f) * t + 2.864584647e-02f) * t + 2.515218084e-01f) * t + 1;
    float phi = z * over / under;
    phi = phi > 0.5f ? 0.5f : phi;
    phi = phi < -0.5f ? -0.5f : phi;
    return 0.5f + phi;
}

/* NaN at infinity, as in torch. */
static inline float gelu(float x) { return x * normal_cdf(x) + 0 * x; }

/* 2^(whole + part), for an integer of at least -126 and a fraction between -1/2 and 1/2. */
static inline float two_to(float whole, float part) {
    float two_to_part = ((((((1.5252734e-5f * part + 1.5403530e-4f) * part + 1.3333558e-3f) * part + 9.6181291e-3f) * part + 5.5504109e-2f) * part + 0.24022651f) * part + 0.69314718f) * part + 1;
    union { int bits; float number; } two_to_whole = {((int)whole + 127) << 23};
    return two_to_part * two_to_whole.number;
}

/* min(e^x, 1), as the square of e^(x/2), so that it may underflow; log2(e) is split into two constants. */
static inline float capped_exponential(float x) {
    union { float number; int bits; } given = {x};
    float t = x > 0 ? 0 : 0.5f * x;
    t = t < -87 ? -87 : t;
    float whole = floorf(1.44269502f * t + 0.5f), root = two_to(whole, 1.44269502f * t - whole + 1.925963e-8f * t);
    return (given.bits & 0x7fffffff) > 0x7f800000 ? x : root * root; /* NaN stays NaN */
}

/* Derivative of gelu: Phi(x) + x phi(x) with the density phi. */
static inline float gelu_derivative(float x) {
    float power = -0.72134752f * x * x, held = power < -126 ? -126 : power;
    float whole = floorf(held + 0.5f), density = 0.39894228f * two_to(whole, held - whole);
    return normal_cdf(x) + x * (power < -126 ? 0 : density); /* infinity * 0 is NaN */
}

static inline float sigmoid(float x) {
    float small = capped_exponential(-fabsf(x));
    return (x < 0 ? small : 1) / (1 + small);
}
