"""Every limit on what a peer may send, in one place, with its unit and its reason.

A limit is checked before the memory that it bounds is allocated. All nodes of one major version share these: what
one node may send, every other takes. What a node chooses for itself (quotas, the size of its pool) is `config`'s;
how many requests run at one time is the transport's.
"""

__all__ = [
    "DIGEST_BYTES",
    "FRESHNESS_S",
    "MAX_ADDRESSES",
    "MAX_ADDRESS_BYTES",
    "MAX_ANNOUNCEMENT_BYTES",
    "MAX_ANNOUNCE_REQUEST_BYTES",
    "MAX_BATCH_BYTES",
    "MAX_BLOOM_BYTES",
    "MAX_BROADCAST_BYTES",
    "MAX_BLOOM_HASHES",
    "MAX_COMPLETIONS",
    "MAX_COMPLETION_BYTES",
    "MAX_DEPTH",
    "MAX_FILE_RECORD_BYTES",
    "MAX_FRAMES",
    "MAX_FRAME_BYTES",
    "MAX_FUTURE_SKEW_S",
    "MAX_GROUP_BYTES",
    "MAX_HELLO_BYTES",
    "MAX_LABEL_BYTES",
    "MAX_NODE_RECORD_BYTES",
    "MAX_OFFERS",
    "MAX_PEERS",
    "MAX_PEERS_RESPONSE_BYTES",
    "MAX_POLICY_VERSIONS",
    "MAX_PULL_REQUEST_BYTES",
    "MAX_PULL_RESPONSE_BYTES",
    "MAX_QUIET_S",
    "MAX_RECORD_BYTES",
    "MAX_REFUSAL_CODE_CHARS",
    "MAX_REFUSAL_DETAIL_CHARS",
    "MAX_REPAIR_REQUEST_BYTES",
    "MAX_REPAIR_RESPONSE_BYTES",
    "MAX_RESPONSE_BYTES",
    "MAX_SMALL_REQUEST_BYTES",
    "MAX_SOURCE_BYTES",
    "MAX_SWARM_ID_BYTES",
    "MAX_TASKS",
    "MAX_UINT64",
    "NODE_RECORD_TTL_S",
    "PUBLIC_KEY_BYTES",
    "ROOT_BYTES",
    "SALT_BYTES",
    "SIGNATURE_BYTES",
    "ZSTD_LEVEL",
]

# Sizes that are no choice.
PUBLIC_KEY_BYTES = 32  # Ed25519
SIGNATURE_BYTES = 64  # Ed25519
ROOT_BYTES = 32  # SHA-256
DIGEST_BYTES = 16  # a task source's digest, a frame's digest: 128 bits, beyond any search for a second preimage
MAX_UINT64 = 2**64 - 1
MAX_DEPTH = 16  # containers within containers, in any record
MAX_RECORD_BYTES = 4 * 2**20  # any one record from a peer
MAX_FILE_RECORD_BYTES = 1 * 2**30  # one record of the node's own files (journal, checkpoint)

# A group and its frame.
MAX_SOURCE_BYTES = 128  # UTF-8 of a task source's name
MAX_COMPLETIONS = 64  # in one group: larger groups add little to an advantage
MAX_COMPLETION_BYTES = 32 * 2**10  # UTF-8 of one completion's text: 8,000 tokens or so
MAX_GROUP_BYTES = 1 * 2**20  # one group's encoding, which a frame must declare before it is decompressed
MAX_FRAME_BYTES = 256 * 2**10  # one group's encoding, compressed: what can be pulled alone
ZSTD_LEVEL = 12  # of what this node writes: half a millisecond a group; higher levels gain under 1 %

# A batch and its announcement.
MAX_FRAMES = 64  # in one batch: which of them a peer holds is one 64-bit mask
MAX_BATCH_BYTES = 4 * 2**20 - 4 * 2**10  # all frames of one batch: what one response can carry
MAX_ANNOUNCEMENT_BYTES = 1024  # signature included; with 64 frames of the largest size and 32 versions it has 760
MAX_POLICY_VERSIONS = 32  # that one batch may name: far more than groups are ever begun ahead
FRESHNESS_S = 600  # an announcement older than this is stale: nobody trains on it, nobody keeps it
MAX_FUTURE_SKEW_S = 60  # how far a peer's clock may be ahead: what NTP does not mend within a minute is wrong

# A node record.
MAX_NODE_RECORD_BYTES = 1024  # signature included: 50 of them in a DHT shard stay far below its 4 MiB
NODE_RECORD_TTL_S = 300  # in the DHT, from `created_at_ms` on; its owner writes a new one every 200 s
MAX_ADDRESSES = 8  # TCP and QUIC over IPv4 and IPv6, local and public
MAX_ADDRESS_BYTES = 256  # one multiaddress with its peer id; through a relay it has two
MAX_LABEL_BYTES = 64  # UTF-8 of `transport`, `software` and `model`
MAX_TASKS = 32  # names of sources; the record's own size is the narrower limit
MAX_SWARM_ID_BYTES = 64  # UTF-8, at least one

# Requests and responses.
MAX_RESPONSE_BYTES = 4 * 2**20  # any response: what every transport can carry
MAX_OFFERS = 256  # announcements in one `announce` or in one response to `repair`
MAX_ANNOUNCE_REQUEST_BYTES = 64 * 2**10  # an announcement of a few frames has 160 bytes: room for 256
MAX_REPAIR_RESPONSE_BYTES = 64 * 2**10  # the same; whoever lacks more asks again
MAX_BROADCAST_BYTES = MAX_ANNOUNCEMENT_BYTES + 64  # an announcement, and who holds the batch
MAX_BLOOM_BYTES = 16 * 2**10  # the filter in `repair`: 10,000 announcements at 13 bits each, 0.2 % found by mistake
MAX_BLOOM_HASHES = 16
MAX_QUIET_S = 255  # for which a node may ask another to send it no announcements
SALT_BYTES = 8  # of the filter: what it hides by mistake once, it shows the next time
MAX_REPAIR_REQUEST_BYTES = MAX_BLOOM_BYTES + 64
MAX_HELLO_BYTES = MAX_NODE_RECORD_BYTES + 256  # both ways
MAX_SMALL_REQUEST_BYTES = 64  # `peers`, and the response to `announce`: room for what newer versions add
MAX_PEERS = 64  # node records in a response to `peers`
MAX_PEERS_RESPONSE_BYTES = MAX_PEERS * (MAX_NODE_RECORD_BYTES + 8)
MAX_PULL_REQUEST_BYTES = 256
MAX_PULL_RESPONSE_BYTES = MAX_RESPONSE_BYTES  # an asker knows the exact size beforehand and asks for no more

# Refusals that a peer is told.
MAX_REFUSAL_CODE_CHARS = 32  # of a-z and _
MAX_REFUSAL_DETAIL_CHARS = 200
