/* How a reducer that was lost is taken in again (docs/protocol.md, "Coming back"): rank 0's reducer
 * asks all workers for a connection, then to hold their next collective, and says from which
 * collective on the owner takes part. Meanwhile the owner may be lost again, an attempt may be given
 * up, and collectives are called at any time.
 *
 * A collective has one piece, which a worker sends to the owner if that is a member for it, and else
 * to an heir, where it also goes when the owner is lost. (That it is answered then is failover.pml's
 * business.)
 *
 * Checked: when all has ended no worker holds anything, every collective of every worker was sent
 * somewhere, and the pieces of one collective all went to one place.
 *
 * Planted faults, each of which the search must find: EARLY (the smallest of the held numbers
 * counts), NO_HOLD (a worker tells its number and goes on), NO_RELEASE (an attempt that is given up
 * is not told).
 */
#ifndef WORKERS
#define WORKERS 2
#endif
#ifndef CALLS
#define CALLS 3
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2
#endif
#ifndef LOSSES
#define LOSSES 1
#endif

#define NOBODY 0
#define OWNER 1
#define HEIR 2

mtype = { BACK, HOLD, EPOCH, LOST };

/* kind, attempt or epoch, lost?, number */
chan down[WORKERS] = [8] of { mtype, byte, bool, byte };
/* kind, attempt, number; from a worker */
chan up[WORKERS] = [8] of { mtype, byte, byte };

byte sent[WORKERS * CALLS];
byte called[WORKERS];
bool holding[WORKERS];
byte losses;
byte ended; /* workers */
bool over;  /* the leader has nothing more to say */

#define STILL(w) (called[w] == CALLS && empty(up[w]) && empty(down[w]))
#if WORKERS == 2
#define QUIET (STILL(0) && STILL(1))
#else
#define QUIET (STILL(0) && STILL(1) && STILL(2))
#endif
#define SENT(w, c) sent[(w) * CALLS + (c)]

proctype Worker(byte w) {
  byte placed = 0; /* collectives that were sent */
  byte since = 0;
  bool lost = true; /* it begins after a first loss */
  bool connected = false;
  byte attempt;
  byte number;
  bool gone;
  byte c;

  do
  :: called[w] < CALLS -> called[w]++

  :: atomic {
       placed < called[w] && !holding[w] ->
       if
       :: !lost && placed >= since -> SENT(w, placed) = OWNER
       :: else -> SENT(w, placed) = HEIR
       fi;
       placed++
     }

  /* The connection breaks, which is told once. */
  :: atomic { connected && losses < LOSSES -> losses++; connected = false; up[w]!LOST, 0, 0 }

  :: atomic {
       down[w]?BACK, attempt, _, _ ->
       if
       :: lost -> connected = true; up[w]!BACK, attempt, 0
       :: lost && losses < LOSSES -> losses++; up[w]!LOST, 0, 0 /* it cannot be reached */
       :: else
       fi
     }

  :: atomic {
       down[w]?HOLD, attempt, _, _ ->
#ifndef NO_HOLD
       holding[w] = true;
#endif
       up[w]!HOLD, attempt, called[w]
     }

  :: atomic {
       down[w]?EPOCH, _, gone, number ->
       holding[w] = false;
       if
       :: gone ->
         /* What went there goes to the heir. */
         c = 0;
         do
         :: c < CALLS ->
           if
           :: SENT(w, c) == OWNER -> SENT(w, c) = HEIR
           :: else
           fi;
           c++
         :: else -> break
         od;
         lost = true;
         connected = false
       :: !gone && lost -> lost = false; since = number
       :: else
       fi
     }

  :: atomic { over && empty(down[w]) && called[w] == CALLS && placed == CALLS -> break }
  od;
  assert(!holding[w]);
  ended++
}

inline tell(kind, a, b, n) {
  i = 0;
  do
  :: i < WORKERS -> down[i]!kind, a, b, n; i++
  :: else -> break
  od
}

/* What worker w says. */
inline hear() {
  if
  :: kind == LOST ->
    if
    :: returning || !lost -> lost = true; returning = false; tell(EPOCH, 0, true, 0)
    :: else
    fi
  :: kind == BACK ->
    if
    :: returning && !hold && attempt == attempts ->
      said = said | (1 << w);
      if
      :: said == (1 << WORKERS) - 1 ->
        hold = true;
        said = 0;
        tell(HOLD, attempts, true, 0)
      :: else
      fi
    :: else
    fi
  :: kind == HOLD ->
    if
    :: returning && hold && attempt == attempts ->
#ifdef EARLY
      if
      :: said == 0 || number < first -> first = number
      :: else
      fi;
#else
      if
      :: said == 0 || number > first -> first = number
      :: else
      fi;
#endif
      said = said | (1 << w);
      if
      :: said == (1 << WORKERS) - 1 ->
        returning = false;
        lost = false;
        tell(EPOCH, 0, false, first)
      :: else
      fi
    :: else
    fi
  fi
}

proctype Leader() {
  bool lost = true;
  bool returning = false;
  bool hold = false;
  byte attempts = 0;
  byte said = 0; /* workers, as bits */
  byte first = 0;
  byte attempt;
  byte number;
  mtype kind;
  byte w;
  byte i;

  do
  :: atomic {
       lost && !returning && attempts < ATTEMPTS ->
       returning = true;
       hold = false;
       said = 0;
       attempts++;
       tell(BACK, attempts, true, 0)
     }

  /* Its time is up. */
  :: atomic {
       returning && attempts == ATTEMPTS ->
       returning = false;
#ifndef NO_RELEASE
       tell(EPOCH, 0, true, 0)
#endif
     }

  :: atomic { up[0]?kind, attempt, number -> w = 0; hear() }
  :: atomic { up[1]?kind, attempt, number -> w = 1; hear() }
#if WORKERS > 2
  :: atomic { up[2]?kind, attempt, number -> w = 2; hear() }
#endif

  /* Nothing more will happen of itself. */
  :: atomic { !returning && (attempts == ATTEMPTS || !lost) && QUIET -> over = true; break }
  od
}

init {
  byte c = 0;
  byte w;
  atomic {
    w = 0;
    do
    :: w < WORKERS -> run Worker(w); w++
    :: else -> break
    od;
    run Leader()
  }
  ended == WORKERS;
  do
  :: c < CALLS ->
    w = 1;
    do
    :: w < WORKERS -> assert(SENT(w, c) == SENT(0, c) && SENT(w, c) != NOBODY); w++
    :: else -> break
    od;
    c++
  :: else -> break
  od
}
