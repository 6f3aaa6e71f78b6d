/* Decodes the chunks of a batch and copies the wanted frames to where they belong: the fast twin of gather.py.

   It is called without Python's global lock, shares nothing between threads and keeps nothing between calls. Decoders
   and checksum are those of the packages lz4, zstandard and google-crc32c: gather.py hands over the addresses of their
   functions, so that this file needs no header and no library but the C compiler's own. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  uint32_t (*crc32c)(const uint8_t *, size_t); /* crc32c_value */
  void *(*create)(void); /* ZSTD_createDCtx, ZSTD_freeDCtx, ZSTD_decompressDCtx */
  size_t (*release)(void *);
  size_t (*decompress)(void *, void *, size_t, const void *, size_t);
  int (*decompress_block)(const char *, char *, int, int); /* LZ4_decompress_safe, LZ4_decompress_safe_partial */
  int (*decompress_start)(const char *, char *, int, int, int);
} Functions;

enum { ZSTD = 0, LZ4 = 1 };
enum { BLOSC_HEADER = 16, BLOSC_STORED = 2, BLOSC_ONE_STREAM = 16, BLOSC_LZ4 = 1 << 5 };

static uint32_t little_endian(const uint8_t *bytes) {
  return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

/* The first `need` bytes of a Blosc chunk as this package writes them: LZ4, no shuffle, one block, one stream.
   Header: version, version of the format, flags, bytes of an item; bytes decoded, of a block, and stored. */
static int decode_blosc(const Functions *functions, const uint8_t *data, size_t size, uint8_t *out, int need, int whole) {
  if (size < BLOSC_HEADER || size > INT32_MAX || little_endian(data + 4) != (uint32_t)whole ||
      little_endian(data + 12) != size)
    return 0;
  int flags = data[2];
  if (flags & BLOSC_STORED) {
    if (size - BLOSC_HEADER != (size_t)whole) return 0;
    memcpy(out, data + BLOSC_HEADER, need);
    return 1;
  }
  /* The block's place, at the end of the header, and its stored size. */
  if ((flags | BLOSC_ONE_STREAM) != (BLOSC_LZ4 | BLOSC_ONE_STREAM) || little_endian(data + 8) != (uint32_t)whole ||
      size < BLOSC_HEADER + 8 || little_endian(data + BLOSC_HEADER) != BLOSC_HEADER + 4 ||
      little_endian(data + BLOSC_HEADER + 4) != size - BLOSC_HEADER - 8)
    return 0;
  const char *block = (const char *)data + BLOSC_HEADER + 8;
  size -= BLOSC_HEADER + 8;
  if (need == whole) return functions->decompress_block(block, (char *)out, (int)size, whole) == whole;
  return functions->decompress_start(block, (char *)out, (int)size, need, whole) >= need;
}

/* Chunk k of n is stored[ends[k]..ends[k + 1]], its CRC32C in the last four bytes; it must be expected[k]. It decodes to
   chunk_bytes bytes, of which the pieces first_piece[k]..first_piece[k + 1] go to `out`: {from, to, bytes} each.
   Returns -1, or the first chunk that is not as expected, or -2 without memory. */
int64_t gather(const Functions *functions, int codec, int64_t n, const uint8_t *stored, const int64_t *ends,
               const uint32_t *expected, const int64_t *first_piece, const int64_t (*pieces)[3], int64_t chunk_bytes,
               uint8_t *out, int64_t out_bytes) {
  void *context = codec == ZSTD ? functions->create() : NULL;
  uint8_t *frames = malloc(chunk_bytes);
  int64_t bad = frames && (context || codec != ZSTD) ? -1 : -2;
  for (int64_t k = 0; k < n && bad == -1; k++) {
    const uint8_t *data = stored + ends[k];
    int64_t size = ends[k + 1] - ends[k] - 4, need = 0;
    for (int64_t p = first_piece[k]; p < first_piece[k + 1]; p++) {
      int64_t from = pieces[p][0], to = pieces[p][1], bytes = pieces[p][2];
      if (from < 0 || to < 0 || bytes < 0 || from > chunk_bytes - bytes || to > out_bytes - bytes) bad = k;
      if (from + bytes > need) need = from + bytes;
    }
    if (bad == k || size < 0 || functions->crc32c(data, size) != expected[k]) {
      bad = k;
      break;
    }
    int right = codec == ZSTD ? functions->decompress(context, frames, chunk_bytes, data, size) == (size_t)chunk_bytes
                              : decode_blosc(functions, data, size, frames, (int)need, (int)chunk_bytes);
    if (!right) bad = k;
    for (int64_t p = first_piece[k]; p < first_piece[k + 1] && right; p++)
      memcpy(out + pieces[p][1], frames + pieces[p][0], pieces[p][2]);
  }
  free(frames);
  if (context) functions->release(context);
  return bad;
}
