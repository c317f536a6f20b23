#define HK_NAMESPACE hk_scalar
#include "isa.inc"
