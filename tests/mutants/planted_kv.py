"""Mutants of blocks, prefixes, names and stored KV."""

from __future__ import annotations

from mutant import Mutant

_POOL = [
    Mutant("kv/cache/pool.py", "            self._generations[block] += 1\n", ""),
    Mutant("kv/cache/pool.py", "for block in reversed(blocks):", "for block in blocks:"),
    Mutant("kv/cache/pool.py", "if num_blocks > self.num_free:", "if num_blocks > self.num_free + 1:"),
    Mutant("kv/cache/pool.py", "            self._owners[block] += 1\n", "            self._owners[block] = 1\n"),
    Mutant(
        "kv/cache/pool.py",
        "            if self._owners[block] == 0:\n                assert",
        "            if False:\n                assert",
    ),
    Mutant(
        "kv/cache/pool.py",
        "        block = next(iter(self._cached))\n",
        "        block = next(reversed(self._cached))\n",
    ),
    Mutant("kv/cache/pool.py", "        if self._on_evict is not None:\n            self._on_evict(block)\n", ""),
    Mutant("kv/cache/pool.py", "        self._is_cached[block] = 0\n", ""),
]

_PREFIX = [
    Mutant("kv/cache/prefix.py", "        self._pool.retain(blocks)\n", ""),
    Mutant("kv/cache/prefix.py", "                self._pool.give_back([result[i]])\n", ""),
    Mutant("kv/cache/prefix.py", "                self._pool.retain([entry.block])\n", ""),
    Mutant("kv/cache/prefix.py", "                result[i] = entry.block\n", ""),
    Mutant("kv/cache/prefix.py", "            doomed.extend(dying.children)\n", "            pass\n"),
    Mutant("kv/cache/prefix.py", "            del entry.parent.children[entry]\n", "            pass\n"),
    Mutant("kv/cache/prefix.py", "        self._note(entry.key, is_stored=False)\n", ""),
    Mutant("kv/cache/prefix.py", "                self._note(inner, is_stored=False)\n", ""),
    Mutant("kv/cache/prefix.py", "            del self._pending[identity]  # undone", "            pass  # undone"),
    Mutant("kv/cache/prefix.py", "            self.resync_needed = True\n", ""),
    Mutant(
        "kv/cache/prefix.py",
        "                low = middle\n            else:\n                high = middle - 1",
        "                low = middle\n            else:\n                high = middle - 2",
    ),
    Mutant(
        "kv/cache/prefix.py",
        "full = min(len(identities) // self._span, len(blocks))",
        "full = min(-(-len(identities) // self._span), len(blocks))",
    ),
]

_NAMES = [
    Mutant("kv/block.py", "            self.weights_fingerprint,\n", ""),
    Mutant("kv/block.py", "            self.scope.isolation_domain.encode(),\n", ""),
    Mutant("kv/block.py", "            self.numerics_class,\n", ""),
    Mutant("kv/block.py", "            self.scope.adapter,\n", ""),
    Mutant("kv/keys.py", "    if model.deterministic:\n        return model.numerics_class\n", ""),
    Mutant("kv/keys.py", "NEVER_ROUNDED if model.fell_back_from else", ""),
    Mutant("kv/messages.py", ', "adapter": scope.adapter}', "}"),
    Mutant(
        "kv/messages.py",
        "CacheScope(message.isolation_domain, message.adapter)",
        'CacheScope(message.isolation_domain, b"")',
    ),
    Mutant("kv/block.py", 'hasher.update(len(part).to_bytes(4, "little") + part)', "hasher.update(part)"),
    Mutant("kv/block.py", "link = blake2b(link + data,", "link = blake2b(root + data,"),
    Mutant(
        "kv/block.py",
        "range(start, len(token_ids) - HASH_BLOCK_TOKENS + 1, HASH_BLOCK_TOKENS)",
        "range(start, len(token_ids), HASH_BLOCK_TOKENS)",
    ),
    Mutant(
        "kv/keys.py",
        "IdentityRoot(scope, self.weights_fingerprint, self.numerics_class)",
        'IdentityRoot(CacheScope(scope.isolation_domain, b""), self.weights_fingerprint, self.numerics_class)',
    ),
]

_STORED = [
    Mutant(
        "kv/store/store.py",
        "self._sealed_tokens[blocks, units] >= self._counts(held)",
        "self._sealed_tokens[blocks, units] > 0",
    ),
    Mutant("kv/store/store.py", "good = (self._sealed_generation[blocks, units] == generations) & (", "good = ("),
    Mutant("kv/store/store.py", "        if cut and not self.verify(tail):\n", "        if False:\n"),
    Mutant(
        "kv/store/store.py",
        "                    digests[:, :, -1] = self._digest(store, tail)[run.start : run.stop, :, 0]\n",
        "                    pass\n",
    ),
    Mutant("kv/store/store.py", "        if 0 < sealed < present:\n", "        if False:\n"),
    Mutant(
        "kv/store/store.py",
        "            if not np.array_equal(covered, wanted):\n",
        "            if False:\n",
    ),
    Mutant(
        "kv/store/store.py",
        "            if any(Codec(section.codec) is not store.codec for section in mine):\n",
        "            if False:\n",
    ),
    Mutant("kv/store/store.py", "        if encoded.non_finite:\n", "        if False:\n"),
    Mutant(
        "kv/store/store.py",
        "        return not any(\n            ((store.digests",
        "        return not all(\n            ((store.digests",
    ),
    Mutant("kv/store/host_store.py", "        return self._device.verify(held)\n", "        return True\n"),
    Mutant("kv/store/host_store.py", "            if not self._device.is_sealed(tail):\n", "            if True:\n"),
    Mutant("kv/store/host_store.py", "        if last < held.end:\n", "        if False:\n"),
    Mutant(
        "kv/cache/residency.py",
        "            if stay is not None and stay.is_findable:\n",
        "            if stay is not None:\n",
    ),
    Mutant("kv/cache/residency.py", "                stay.used_s = self.now_s\n", ""),
    Mutant(
        "kv/cache/residency.py",
        "            self._stays[block] = _Stay(self.now_s, self.now_s)\n",
        "            self._stays.setdefault(block, _Stay(self.now_s, self.now_s))\n",
    ),
    Mutant("kv/digest.py", "(units * multiplier + addend * np.uint64(tokens))", "(units * multiplier)"),
    Mutant("kv/digest.py", "np.arange(first_token, first_token + tokens, dtype", "np.arange(0, tokens, dtype"),
    Mutant("kv/digest.py", "(layer << np.uint64(48)) | (part << np.uint64(40)) |", "(layer << np.uint64(48)) |"),
    Mutant("kv/digest.py", "(head << np.uint64(24)) | block\n", "block\n"),
    Mutant("kv/digest.py", '"ij,j->i", part, flat', '"ij,j->i", part * (start == 0), flat'),
    Mutant("kv/digest.py", "    if scales is not None:\n        column", "    if False:\n        column"),
    Mutant("kv/digest.py", "_mix(place ^ _seed(key, _MULTIPLIER)) | one", "_mix(place ^ _seed(key, _MULTIPLIER))"),
    Mutant("kv/keys.py", 'digest_size=8, person=b"twostroke-digest"', 'digest_size=4, person=b"twostroke-digest"'),
]

MUTANTS = [*_POOL, *_PREFIX, *_NAMES, *_STORED]
