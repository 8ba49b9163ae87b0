/* Failover of reducers, as docs/protocol.md has it: workers push pieces to owners in the order of
 * their keys; any standalone owner may die at any instant, and any connection to one may break.
 *
 * One piece an operation, all-reduce in place: an answer overwrites the worker's input, and from
 * then on the worker has the result only as long as it keeps it (retention).
 *
 * Checked: no deadlock (every worker gets every answer), no answer for a piece that was not asked
 * for, no slot that takes a worker's part twice.
 *
 * Planted faults, each of which the search must find: NO_KEEPING (results are not kept),
 * SETTLE_EARLY (a worker says that it has moved its pieces before it has), WINDOW_STRICT (pieces that
 * come late wait for the window as if they were on time). EAGER: all operations have begun at the
 * start, which leaves far fewer states.
 */
#ifndef WORKERS
#define WORKERS 2
#endif
#ifndef REDUCERS
#define REDUCERS 2
#endif
#ifndef PIECES
#define PIECES 3
#endif
#ifndef WINDOW
#define WINDOW 1
#endif
#ifndef FAULTS
#define FAULTS 2
#endif

#define OWNERS (REDUCERS + 1) /* the last one is the reducer inside worker 0: it does not die */
#define ALL ((1 << WORKERS) - 1)
#define CAPACITY (PIECES + 2)

mtype = { PUSH, AGAIN, SETTLED, RESULT };
mtype = { UNSENT, SENT, ANSWERED };

/* Connections: by worker * OWNERS + owner. up: kind, piece, epoch, acknowledged; down: piece, epoch,
 * acknowledged by all. */
chan up[WORKERS * OWNERS] = [CAPACITY] of { mtype, byte, byte, byte };
chan down[WORKERS * OWNERS] = [CAPACITY] of { byte, byte, byte };
bool broken[WORKERS * OWNERS];
/* Membership: worker -> leader, leader -> worker. */
chan report[WORKERS] = [REDUCERS] of { byte };
chan news[WORKERS] = [REDUCERS] of { byte, byte }; /* epoch, lost owners as bits */
bool dead[OWNERS];
byte faults;
byte finished;

#define LINK(w, o) ((w) * OWNERS + (o))

/* The first owner of the piece's preference that is not lost. */
inline targetOf(p, lost, target) {
  target = p % REDUCERS;
  if
  :: (lost & (1 << target)) && !(lost & (1 << ((p + 1) % REDUCERS))) ->
    target = (p + 1) % REDUCERS
  :: (lost & (1 << target)) && (lost & (1 << ((p + 1) % REDUCERS))) -> target = REDUCERS
  :: else
  fi
}

/* Everything below is answered, of what goes to owner o. */
inline acknowledged(o, ack) {
  ack = 0;
  do
  :: ack < PIECES ->
    targetOf(ack, lost, t);
    if
    :: t == o && state[ack] != ANSWERED -> break
    :: else -> ack++
    fi
  :: else -> break
  od
}

/* Which owners a piece can be sent to now: the oldest unsent, if the window lets it. Of what is in
 * flight only that counts which stands before it. */
inline look() {
  ready = 0;
  o = 0;
  do
  :: o < OWNERS ->
    if
    :: !(lost & (1 << o)) ->
      oldest(o);
      if
      :: p < called ->
        inflight = 0;
        e = 0;
        do
#ifdef WINDOW_STRICT
        :: e < called ->
#else
        :: e < p ->
#endif
          targetOf(e, lost, t);
          if
          :: t == o && state[e] == SENT -> inflight++
          :: else
          fi;
          e++
        :: else -> break
        od;
        if
        :: inflight < WINDOW -> ready = ready | (1 << o)
        :: else
        fi
      :: else
      fi;
      if
#ifdef SETTLE_EARLY
      :: owes[o] -> ready = ready | (1 << (o + OWNERS))
#else
      :: owes[o] && p == called -> ready = ready | (1 << (o + OWNERS))
#endif
      :: else
      fi
    :: else
    fi;
    o++
  :: else -> break
  od;
  o = 0; p = 0; t = 0; e = 0; inflight = 0; ack = 0
}

/* The oldest piece that is to go to owner o. */
inline oldest(o) {
  p = 0;
  do
  :: p < called ->
    targetOf(p, lost, t);
    if
    :: t == o && state[p] == UNSENT -> break
    :: else -> p++
    fi
  :: else -> break
  od
}

#define CAN_PUSH(i) ((ready & (1 << (i))) && !broken[LINK(w, i)])
#define CAN_SETTLE(i) ((ready & (1 << ((i) + OWNERS))) && !broken[LINK(w, i)])
#define CAN_READ(i) (!(lost & (1 << (i))) && nempty(down[LINK(w, i)]))
#define MUST_TELL(i) (broken[LINK(w, i)] && !told[i] && !(lost & (1 << (i))))

inline push(i) {
  oldest(i);
  acknowledged(i, ack);
  assert(nfull(up[LINK(w, i)]));
  up[LINK(w, i)] ! PUSH, p, epoch, ack;
  state[p] = SENT;
  look()
}

inline settle(i) {
  acknowledged(i, ack);
  assert(nfull(up[LINK(w, i)]));
  up[LINK(w, i)] ! SETTLED, 0, epoch, ack;
  owes[i] = false;
  look()
}

inline read(i) {
  down[LINK(w, i)] ? p, e, ack;
  targetOf(p, lost, t);
  assert(t == i && state[p] == SENT);
  state[p] = ANSWERED;
  answers++;
#ifndef NO_KEEPING
  kept[p] = true;
  via[p] = i;
#endif
  if
  :: answers == PIECES -> finished++
  :: else
  fi;
  /* What all have need not be kept. */
  if
  :: e >= epoch ->
    p = 0;
    do
    :: p < ack ->
      if
      :: kept[p] && via[p] == i -> kept[p] = false; via[p] = 0
      :: else
      fi;
      p++
    :: else -> break
    od
  :: else
  fi;
  look()
}

proctype Worker(byte w) {
  mtype state[PIECES];
  bool kept[PIECES];
  byte via[PIECES];       /* whose answer is kept */
  bool told[REDUCERS];    /* the leader, of a lost connection */
  bool owes[OWNERS];      /* SETTLED */
  byte called;            /* operations begun */
  byte answers;
  byte lost;
  byte epoch;
  byte ready;             /* owners to push to; owners to settle with */
  byte o, p, t, e, ack, inflight, news_lost;

  p = 0;
  do
  :: p < PIECES -> state[p] = UNSENT; p++
  :: else -> break
  od;
#ifdef EAGER /* all operations have begun: far fewer states */
  atomic { called = PIECES; look() }
#endif

  do
  /* The user begins the next operation. */
#ifndef EAGER
  :: atomic { called < PIECES -> called++; look() }
#endif
  :: atomic { CAN_PUSH(0) -> push(0) }
  :: atomic { CAN_PUSH(1) -> push(1) }
  :: atomic { CAN_PUSH(REDUCERS) -> push(REDUCERS) }
  :: atomic { CAN_SETTLE(0) -> settle(0) }
  :: atomic { CAN_SETTLE(1) -> settle(1) }
  :: atomic { CAN_SETTLE(REDUCERS) -> settle(REDUCERS) }
  :: atomic { CAN_READ(0) -> read(0) }
  :: atomic { CAN_READ(1) -> read(1) }
  :: atomic { CAN_READ(REDUCERS) -> read(REDUCERS) }
  :: atomic { MUST_TELL(0) -> told[0] = true; report[w] ! 0 }
  :: atomic { MUST_TELL(1) -> told[1] = true; report[w] ! 1 }

  /* The leader's word: an owner is lost. What it had goes to the next in the preference: the
   * contributions that were not answered again, in their turn; results that are kept at once. */
  :: atomic {
      news[w] ? e, news_lost ->
      epoch = e;
      o = 0;
      do
      :: o < REDUCERS ->
        if
        :: (news_lost & (1 << o)) && !(lost & (1 << o)) ->
          /* Nothing that still comes from there counts. */
          broken[LINK(w, o)] = true;
          do
          :: nempty(down[LINK(w, o)]) -> down[LINK(w, o)] ? p, e, ack
          :: empty(down[LINK(w, o)]) -> break
          od;
          do
          :: nempty(up[LINK(w, o)]) -> up[LINK(w, o)] ? _, p, e, ack
          :: empty(up[LINK(w, o)]) -> break
          od;
          p = 0;
          do
          :: p < PIECES ->
            targetOf(p, lost, t);
            if
            :: t == o && state[p] == SENT -> state[p] = UNSENT
            :: else
            fi;
            if
            :: kept[p] && via[p] == o ->
              targetOf(p, news_lost, t);
              via[p] = t;
              if
              :: !broken[LINK(w, t)] ->
                assert(nfull(up[LINK(w, t)]));
                up[LINK(w, t)] ! AGAIN, p, epoch, 0
              :: else /* it is lost, too, which the leader will hear */
              fi
            :: else
            fi;
            p++
          :: else -> break
          od;
          lost = lost | (1 << o);
          told[o] = false
        :: else
        fi;
        o++
      :: else -> break
      od;
      o = 0;
      do
      :: o < OWNERS -> owes[o] = !(lost & (1 << o)); o++
      :: else -> break
      od;
      look();
      news_lost = 0
    }

  :: atomic { finished == WORKERS -> break }
  od
}

inline take(from) {
  w = from;
  up[LINK(w, o)] ? kind, p, e, a;
  if
  :: kind == AGAIN -> skip
  :: else -> ack[w] = a; ack_epoch[w] = e
  fi;
  /* What all acknowledge, and in which epoch. */
  min_epoch = 255;
  min_ack = 255;
  a = 0;
  do
  :: a < WORKERS ->
    if
    :: ack[a] < min_ack -> min_ack = ack[a]
    :: else
    fi;
    if
    :: ack_epoch[a] < min_epoch -> min_epoch = ack_epoch[a]
    :: else
    fi;
    a++
  :: else -> break
  od;
  if
  :: kind == PUSH ->
    assert(!(parts[p] & (1 << w)));
    parts[p] = parts[p] | (1 << w)
  :: kind == AGAIN ->
    has[p] = true;
    since[p] = e
  :: kind == SETTLED ->
    settled[w] = e
  fi;
  if
  :: kind != SETTLED && (has[p] || parts[p] == ALL) ->
    a = 0;
    do
    :: a < WORKERS ->
      if
      :: (parts[p] & (1 << a)) && !broken[LINK(a, o)] ->
        assert(nfull(down[LINK(a, o)]));
        down[LINK(a, o)] ! p, min_epoch, min_ack
      :: else
      fi;
      a++
    :: else -> break
    od;
    parts[p] = 0
  :: else
  fi;
  /* Results that were handed on are of no use once all have moved their pieces. */
  if
  :: kind == SETTLED ->
    e = 255;
    a = 0;
    do
    :: a < WORKERS ->
      if
      :: settled[a] < e -> e = settled[a]
      :: else
      fi;
      a++
    :: else -> break
    od;
    p = 0;
    do
    :: p < PIECES ->
      if
      :: has[p] && since[p] <= e -> has[p] = false; since[p] = 0
      :: else
      fi;
      p++
    :: else -> break
    od
  :: else
  fi;
  kind = 0; w = 0; p = 0; e = 0; a = 0; min_epoch = 0; min_ack = 0
}

#define HAS_FRAME(i) (!dead[o] && !broken[LINK(i, o)] && nempty(up[LINK(i, o)]))

proctype Owner(byte o) {
  byte parts[PIECES];    /* contributions, as bits */
  bool has[PIECES];      /* a result that was handed on */
  byte since[PIECES];    /* the epoch in which */
  byte ack[WORKERS];
  byte ack_epoch[WORKERS];
  byte settled[WORKERS];
  mtype kind;
  byte w, p, e, a, min_epoch, min_ack;

  do
  :: atomic { HAS_FRAME(0) -> take(0) }
  :: atomic { HAS_FRAME(1) -> take(1) }
#if WORKERS > 2
  :: atomic { HAS_FRAME(2) -> take(2) }
#endif
  :: atomic { dead[o] -> break }
  :: atomic { finished == WORKERS -> break }
  od
}

/* In worker 0's process: any connection that is lost loses the owner, for all. */
inline hear(from) {
  report[from] ? o;
  if
  :: !(lost & (1 << o)) ->
    lost = lost | (1 << o);
    epoch++;
    w = 0;
    do
    :: w < WORKERS -> news[w] ! epoch, lost; w++
    :: else -> break
    od
  :: else
  fi;
  w = 0; o = 0
}

proctype Leader() {
  byte lost, epoch, w, o;
  do
  :: atomic { nempty(report[0]) -> hear(0) }
  :: atomic { nempty(report[1]) -> hear(1) }
#if WORKERS > 2
  :: atomic { nempty(report[2]) -> hear(2) }
#endif
  :: atomic { finished == WORKERS -> break }
  od
}

/* kill -9 of a reducer; or only one connection to it breaks. What was under way may still come, or
 * not: a worker reads a broken connection until it hears from the leader. */
proctype Faults() {
  byte o, w;
  do
  :: faults < FAULTS && finished < WORKERS ->
    atomic {
      select(o : 0 .. REDUCERS - 1);
      if
      :: !dead[o] ->
        faults++;
        if
        :: dead[o] = true;
          w = 0;
          do
          :: w < WORKERS -> broken[LINK(w, o)] = true; w++
          :: else -> break
          od
        :: select(w : 0 .. WORKERS - 1); broken[LINK(w, o)] = true
        fi
      :: else
      fi;
      o = 0; w = 0
    }
  :: break
  od
}

init {
  byte i;
  atomic {
    i = 0;
    do
    :: i < WORKERS -> run Worker(i); i++
    :: else -> break
    od;
    i = 0;
    do
    :: i < OWNERS -> run Owner(i); i++
    :: else -> break
    od;
    run Leader();
    run Faults()
  }
}
