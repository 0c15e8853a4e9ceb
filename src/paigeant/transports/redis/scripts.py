"""What is done at the server in one go, because only there it can be looked whose an entry is.

All scripts get the keys and the group of a topic, and find them on one node of a cluster.

An entry of a stream has the fields `id` and `body`; one that was delivered before also `n`, how often, and `t`, the
millisecond in which the message came first. A bell is an entry without a message: it wakes one of the subscribers, so
that it looks when the next delayed message is due. Delayed messages wait as entries of a second stream, whose ids a
sorted set has with the microsecond in which each is due.

What frees memory comes before what takes some: a script that has written may go on when memory is full, so that a topic
can be emptied then.
"""

from __future__ import annotations

import hashlib

__all__ = [
    "ACK",
    "CLAIM",
    "CONSUMERS",
    "DEPTH",
    "DUE",
    "EXAMINE",
    "FORGET",
    "LATER",
    "PENDING",
    "RECLAIM",
    "RETURN",
    "RIGHTS",
    "Script",
]

_COMMON = """
local stream, later, due, group = KEYS[1], KEYS[2], KEYS[3], ARGV[1]

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function whole(number)
  return string.format('%.0f', number)
end

local function named(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

local function fields(entry)
  return named(entry[2])
end

-- Whoever may write to the stream chooses the fields of its entries: what is no number, or none that can be, is passed
-- over.
local function count(text)
  local number = tonumber(text)
  if not number or not (number > 0) then return 0 end
  return math.floor(math.min(number, 2147483647))
end

local function came_at(entry)
  local told = tonumber(fields(entry).t)
  if told and told >= 0 and told <= now() / 1000 then return told end
  return tonumber(string.match(entry[1], '^%d+'))
end

local function add(to, id, body, n, t)
  return redis.call('XADD', to, '*', 'id', id, 'body', body, 'n', whole(n), 't', whole(t))
end

local function group_info()
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if groups.err then return nil end
  for _, flat in ipairs(groups) do
    local found = named(flat)
    if found.name == group then return found end
  end
end

local function next_undelivered(info)
  return redis.call('XRANGE', stream, '(' .. info['last-delivered-id'], '+', 'COUNT', 1)[1]
end

local function is_bell(entry)
  return entry ~= nil and fields(entry).bell ~= nil
end

-- Raises where the keys hold something else. A script that fails undoes nothing, so this comes before it takes a
-- message away.
local function check_later()
  redis.call('XLEN', later)
  redis.call('ZCARD', due)
end

local function set_aside(id, body, n, t, delay, look)
  local entry = add(later, id, body, n, t)
  redis.call('ZADD', due, whole(now() + delay), entry)
  -- Who is blocked looks again within `look`. One that is due before that, and before all others, must wake somebody,
  -- unless there is something that does so anyway.
  if delay <= look and redis.call('ZRANGE', due, 0, 0)[1] == entry then
    local info = group_info()
    if info and not next_undelivered(info) then redis.call('XADD', stream, '*', 'bell', '1') end
  end
end

local function pending(entry, consumer)
  local found = redis.pcall('XPENDING', stream, group, entry, entry, 1, consumer)
  return found[1]
end

local function remove(entry)
  redis.call('XACK', stream, group, entry)
  redis.call('XDEL', stream, entry)
end

local function give_back(entry, delivered, delay, look)
  local found = redis.call('XRANGE', stream, entry, entry)[1]
  remove(entry)
  if not found or is_bell(found) then return end
  local old = fields(found)
  local n, t = count(old.n) + delivered, came_at(found)
  if delay > 0 then
    set_aside(old.id or entry, old.body or '', n, t, delay, look)
  else
    add(stream, old.id or entry, old.body or '', n, t)
  end
end
"""


class Script:
    """A script, and the digest by which a server knows it."""

    def __init__(self, text: str) -> None:
        self.text = _COMMON + text
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


LATER = Script("""
check_later()
set_aside(ARGV[4], ARGV[5], 0, math.floor(now() / 1000), tonumber(ARGV[3]), tonumber(ARGV[2]))
""")
"""look, delay, id, body: have a message delivered later."""

DUE = Script("""
check_later()
redis.call('XLEN', stream)
for i = 3, #ARGV do remove(ARGV[i]) end
local entries = redis.call('ZRANGEBYSCORE', due, '-inf', whole(now()), 'LIMIT', 0, ARGV[2])
for _, entry in ipairs(entries) do
  local found = redis.call('XRANGE', later, entry, entry)[1]
  redis.call('ZREM', due, entry)
  redis.call('XDEL', later, entry)
  if found then
    local old = fields(found)
    add(stream, old.id or entry, old.body or '', count(old.n), came_at(found))
  end
end
-- Somebody has deleted the set: nothing else would ever deliver what stands in the stream alone.
if redis.call('XLEN', later) > redis.call('ZCARD', due) then
  for _, left in ipairs(redis.call('XRANGE', later, '-', '+', 'COUNT', ARGV[2])) do
    redis.call('ZADD', due, 'NX', whole(now()), left[1])
  end
end
local following = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
if not following[1] then return -1 end
return math.max(0, tonumber(following[2]) - now())
""")
"""limit, bells: move what is due into the stream; gives the microseconds until more is, or -1."""

CLAIM = Script("""
local found = redis.call('XAUTOCLAIM', stream, group, ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
return {found[1], found[2]}
""")
"""consumer, idle_ms, cursor, count: take over what was held for so long; gives the next cursor and the entries."""

ACK = Script("""
for i = 3, #ARGV do
  if pending(ARGV[i], ARGV[2]) then remove(ARGV[i]) end
end
""")
"""consumer, entries: delete those that are still its own."""

RETURN = Script("""
if tonumber(ARGV[4]) > 0 then check_later() end
for i = 6, #ARGV do
  local mine = pending(ARGV[i], ARGV[2])
  if mine then give_back(ARGV[i], mine[4] - tonumber(ARGV[5]), tonumber(ARGV[4]), tonumber(ARGV[3])) end
end
""")
"""consumer, look, delay, uncounted deliveries, entries: give back those that are still its own."""

EXAMINE = Script("""
local mine = pending(ARGV[3], ARGV[2])
local found = redis.call('XRANGE', stream, ARGV[3], ARGV[3])[1]
if not mine or not found then return false end
local old = fields(found)
return {count(old.n) + mine[4], string.sub(old.body or '', 1, tonumber(ARGV[4]))}
""")
"""consumer, entry, bytes: how often it was delivered and the beginning of its body, if it is its own."""

PENDING = Script("""
local ids = {}
local found = redis.pcall('XPENDING', stream, group, ARGV[3], '+', ARGV[4], ARGV[2])
for i = 1, #found do ids[i] = found[i][1] end
return ids
""")
"""consumer, start, count: the ids of the entries that it has."""

CONSUMERS = Script("""
local consumers = {}
for i, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
  local found = named(flat)
  consumers[i] = {found.name, found.pending, found.idle}
end
return consumers
""")
"""Each consumer's name, how many entries it has, and for how many milliseconds it was not heard of."""

RECLAIM = Script("""
for _, each in ipairs(redis.call('XPENDING', stream, group, '-', '+', ARGV[3], ARGV[2])) do
  give_back(each[1], each[4], 0, 0)
end
return #redis.call('XPENDING', stream, group, '-', '+', 1, ARGV[2])
""")
"""consumer, limit: give back what a consumer had that is gone; gives whether there is more."""

FORGET = Script("""
local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, group)
for i = 1, #consumers do
  local found = named(consumers[i])
  if found.name == ARGV[2] then
    if found.pending > 0 or found.idle < tonumber(ARGV[3]) then return 0 end
    redis.call('XGROUP', 'DELCONSUMER', stream, group, ARGV[2])
  end
end
return 1
""")
"""consumer, idle_ms: delete it if it has nothing and was not heard of for so long; gives whether it is gone."""

DEPTH = Script("""
local waiting, taken, oldest = redis.call('XLEN', stream), 0, -1
local info = waiting > 0 and group_info()
if info then
  taken = info.pending
  waiting = waiting - taken
  if is_bell(next_undelivered(info)) then waiting = waiting - 1 end
end
local firsts = redis.call('XRANGE', stream, '-', '+', 'COUNT', 2)
table.insert(firsts, redis.call('XRANGE', later, '-', '+', 'COUNT', 1)[1])
for _, entry in ipairs(firsts) do
  if not is_bell(entry) then
    local age = now() / 1000 - came_at(entry)
    if age > oldest then oldest = age end
  end
end
-- One of the two may have been deleted: what isn't in both is no message.
local delayed = math.min(redis.call('XLEN', later), redis.call('ZCARD', due))
return {waiting + delayed, taken, oldest}
""")
"""How many wait, how many are taken, and the age of the oldest in milliseconds, or -1."""

RIGHTS = Script("""
local lacking = {}
local function try(command, ...)
  local answer = redis.pcall(command, ...)
  local trouble = type(answer) == 'table' and answer.err or ''
  -- The second is what Redis 7.0 says, the third what 8.0 does.
  for _, refused in ipairs({'NOPERM', "can't run this command", 'no permissions to run', 'Unknown Redis command'}) do
    if string.find(trouble, refused, 1, true) then
      table.insert(lacking, command)
      return
    end
  end
end

try('TIME')
try('XADD', stream, 'NOMKSTREAM', '0-0', 'bell', '1')
try('XLEN', stream)
try('XRANGE', stream, '-', '+', 'COUNT', 1)
try('XREADGROUP', 'GROUP', group, 'nobody', 'COUNT', 1, 'STREAMS', stream, '0')
try('XAUTOCLAIM', stream, group, 'nobody', 1e15, '-', 'COUNT', 1)
try('XPENDING', stream, group, '-', '+', 1)
try('XACK', stream, group, '0-0')
try('XDEL', stream, '0-0')
try('SMEMBERS', stream)
try('XGROUP', 'CREATE', stream, group, '0')
try('XGROUP', 'DELCONSUMER', stream, group, 'nobody')
try('XINFO', 'GROUPS', stream)
try('XINFO', 'CONSUMERS', stream, group)
try('ZADD', due, 'XX', 0, '0-0')
try('ZCARD', due)
try('ZRANGE', due, 0, 0)
try('ZRANGEBYSCORE', due, '-inf', 0, 'LIMIT', 0, 1)
try('ZREM', due, '0-0')
return lacking
""")
"""Which of the needed commands the user may not give. For a topic that nobody has: so none of them changes anything."""
