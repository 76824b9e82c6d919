//! Attention of a decode step: every (KV head, tokens) task makes a partial, and the partials of a head are merged.

use std::ops::Range;

use longbit_sys::Worker;

use super::super::profile::Op;
use super::super::scratch::Private;
use super::Pass;
use crate::attention::tasks::{CHUNK_TOKENS, COARSE_TOKENS, Grain, ORDER, Task, cut, tokens};
use crate::attention::{
    Read, Selection, gather_above, gather_chunk, partial, reads, score_chunk, weights_len,
};

/// Tasks that go to whoever comes first: fine ones with an eighth of the tokens that several threads have to share, if that
/// is one a thread, for the threads share the bandwidth of memory less evenly than the work. They come last. It changes no
/// bits.
fn on_demand(tasks: &[Task], coarse: usize, pieces: &[Range<usize>], worker: &Worker<'_>) -> usize {
    let all: usize = tasks.iter().map(|task| tokens(task, pieces)).sum();
    let some = (all / 8 / CHUNK_TOKENS).min(tasks.len() - coarse);
    if worker.count() > 1 && some >= worker.count() { some } else { 0 }
}

/// The tasks of a thread: as many tokens for each as whole tasks allow.
fn share_by_tokens(tasks: &[Task], pieces: &[Range<usize>], worker: &Worker<'_>) -> Range<usize> {
    let total: usize = tasks.iter().map(|task| tokens(task, pieces)).sum();
    let (mut before, mut range) = (0, 0..0);
    for task in tasks {
        let tokens = tokens(task, pieces);
        // A task belongs to the thread in whose share of all tokens its middle lies.
        let owner = (2 * before + tokens) * worker.count() / (2 * total).max(1);
        range.start += usize::from(owner < worker.index());
        range.end += usize::from(owner <= worker.index());
        before += tokens;
    }
    range
}

/// The tasks of a layer and a thread's part of them.
struct Work<'a> {
    /// Of KV heads: first the coarse ones of all heads, then the fine ones, the tasks of a head in order each.
    tasks: &'a [Task],
    /// How many of them are coarse.
    coarse: usize,
    /// Tokens.
    pieces: &'a [Range<usize>],
    /// Which tasks are the thread's.
    mine: Range<usize>,
    /// Tasks that are nobody's until somebody takes them.
    rest: Range<usize>,
    /// Slot of the first task in the buffer of partials.
    base: usize,
}

impl Work<'_> {
    fn pieces(&self, task: usize) -> &[Range<usize>] {
        &self.pieces[self.tasks[task].1.clone()]
    }

    /// Slots of the tasks of a head, in the order in which their partials are merged.
    fn slots(&self, kv_head: usize) -> [Range<usize>; 2] {
        ORDER.map(|grain| {
            let (coarse, fine) = self.tasks.split_at(self.coarse);
            let (tasks, base) = match grain {
                Grain::Coarse => (coarse, self.base),
                Grain::Fine => (fine, self.base + self.coarse),
            };
            let first = tasks.partition_point(|task| task.0 < kv_head);
            base + first..base + tasks.partition_point(|task| task.0 <= kv_head)
        })
    }

    /// The end of the tasks from `start` on whose keys are read before their values: those of a head that are no more
    /// together than a coarse one, for each change from one to the other costs a moment in which memory waits. It changes no
    /// bits.
    fn together(&self, start: usize, end: usize) -> usize {
        let Some(first) = self.tasks[..end].get(start) else { return end };
        let mut held = 0;
        let some = self.tasks[start..end].iter().take_while(|task| {
            held += tokens(task, self.pieces);
            task.0 == first.0 && held <= COARSE_TOKENS
        });
        start + some.count()
    }
}

impl Pass<'_> {
    /// Lists the tasks of KV heads, and returns how many are coarse.
    fn list_tasks(
        &self,
        heads: Range<usize>,
        pieces: &mut Vec<Range<usize>>,
        tasks: &mut Vec<Task>,
    ) -> usize {
        pieces.clear();
        tasks.clear();
        let mut list = |grain| {
            for kv_head in heads.clone() {
                let selection = &self.scratch.selections[kv_head];
                let selection: &Selection = &selection.read().unwrap_or_else(|e| e.into_inner());
                cut(kv_head, &selection.spans, grain, pieces, tasks);
            }
            tasks.len()
        };
        let coarse = list(Grain::Coarse);
        list(Grain::Fine);
        coarse
    }

    /// Whether every KV head is a single task, so that the thread which appended to it can also serve it: two barriers a
    /// layer cost more than an uneven share of so little.
    pub(super) fn heads_are_single_tasks(&self) -> bool {
        self.tokens.len() == 1 && self.position < CHUNK_TOKENS
    }

    pub(super) fn decode_attention(&self, worker: &Worker<'_>, p: &mut Private, l: usize) {
        let (s, kernels, d) = (self.scratch, self.kernels(), self.model.config.head_dim);
        let (mut pieces, mut tasks) = (std::mem::take(&mut p.pieces), std::mem::take(&mut p.tasks));
        let heads = self.model.config.kv_heads;
        let alone = self.heads_are_single_tasks();
        let owned = worker.range(heads);
        let coarse = self.list_tasks(if alone { owned.clone() } else { 0..heads }, &mut pieces, &mut tasks);
        // What another thread's head decides is known only after a barrier.
        let floors = self.floors(if alone { owned.clone() } else { 0..heads });
        let rest = if alone || floors.is_some() { 0 } else { on_demand(&tasks, coarse, &pieces, worker) };
        let rest = tasks.len() - rest..tasks.len();
        let mine =
            if alone { 0..tasks.len() } else { share_by_tokens(&tasks[..rest.start], &pieces, worker) };
        // The partials of a thread that is alone with its heads begin at the first of them, one each.
        let base = if alone { owned.start } else { 0 };
        let work = Work { tasks: &tasks, coarse, pieces: &pieces, mine, rest, base };
        let bytes = match floors {
            Some(below) => self.attend_above(worker, p, l, &work, &below),
            None => {
                let mut bytes = self.attend(p, l, &work, work.mine.clone());
                while let Some(task) = work.rest.clone().nth(self.take_one(&work, l)) {
                    bytes += self.attend(p, l, &work, task..task + 1);
                }
                self.scratch.count(bytes as u64, 0, 0);
                bytes
            }
        };
        p.clock.lap(Op::Attention, || bytes);
        if !alone {
            self.barrier(worker, p);
        }
        let slot_len = self.model.config.group() * partial::stride(d);
        p.partials.resize(slot_len, 0.0);
        for kv_head in owned {
            partial::clear(&mut p.partials, d);
            for slots in work.slots(kv_head) {
                let partials = s.partials.read_range(slots.start * slot_len..slots.end * slot_len);
                partial::merge(kernels, &mut p.partials, &partials, d, &mut p.factors);
            }
            let selection = s.selections[kv_head].read().unwrap_or_else(|e| e.into_inner());
            let capture = s.capture.get().filter(|_| self.capture);
            let stripe = l * self.model.config.kv_heads + kv_head;
            if let Some(capture) = capture {
                capture.decided(stripe, &selection, &p.partials, d);
            }
            if !selection.tail.is_empty() {
                partial::merge(kernels, &mut p.partials, &selection.tail, d, &mut p.factors);
            }
            let mut out = s.attn.write(kv_head);
            partial::finish(kernels, &p.partials, d, &mut out);
            self.cache.head(l, kv_head).restore_outputs(&mut out);
            if let Some(capture) = capture {
                capture.output(stripe, &out);
            }
        }
        (p.pieces, p.tasks) = (pieces, tasks);
        p.clock.lap(Op::Merge, || 0);
    }

    /// The place in [`Work::rest`] of a task that nobody has taken yet; behind its end when there is none.
    fn take_one(&self, work: &Work<'_>, l: usize) -> usize {
        if work.rest.is_empty() { 0 } else { self.scratch.ticket(l) }
    }

    /// Partials of the tasks `mine`: of [`Work::together`] first the keys, then the values. Returns the bytes that were
    /// read.
    fn attend(&self, p: &mut Private, l: usize, work: &Work<'_>, mine: Range<usize>) -> usize {
        let (s, d, group) = (self.scratch, self.model.config.head_dim, self.model.config.group());
        let Work { tasks, pieces, base, .. } = work;
        let (mut slot, mut bytes) = (mine.start, 0);
        while slot < mine.end {
            let kv_head = tasks[slot].0;
            let last = work.together(slot, mine.end);
            let queries = s.queries.read_stripe(kv_head);
            let queries = &queries[..group * d];
            let kv = self.cache.head(l, kv_head);
            // The pages of these tasks and of those that follow; the first time they are not there in time.
            let pages = if slot == mine.start { slot } else { last }..work.together(last, mine.end);
            for task in tasks[pages].iter().filter(|task| task.0 == kv_head) {
                pieces[task.1.clone()].iter().for_each(|piece| kv.request(piece));
            }
            let all: Vec<Vec<Read<'_>>> =
                (slot..last).map(|i| reads(&kv, work.pieces(i)).collect()).collect();
            // What a thread reads first of a task, and what it reads after these tasks.
            let first = |i: usize, values| match all.get(i).and_then(|all| all.first()) {
                Some(read) => read.parts(values),
                None => [&[][..]; 4],
            };
            let after = match tasks[..mine.end].get(last).filter(|task| task.0 == kv_head) {
                Some(task) => reads(&kv, &pieces[task.1.clone()]).next().map(|read| read.parts(false)),
                None => None,
            };
            let needed = all.iter().map(|all| weights_len(all, group)).sum();
            if p.weights.len() < needed {
                p.weights.resize(needed, 0.0);
            }
            kv.prepare(queries, &mut p.kv);
            let mut weights = &mut p.weights[..];
            for (i, task) in all.iter().enumerate() {
                let upcoming = if i + 1 < all.len() { first(i + 1, false) } else { first(0, true) };
                let mut partials = s.partials.write(base + slot + i);
                score_chunk(queries, &kv, task, &upcoming, &mut p.kv, weights, &mut partials);
                weights = &mut weights[weights_len(task, group)..];
            }
            let mut weights = &mut p.weights[..];
            for (i, task) in all.iter().enumerate() {
                let upcoming = if i + 1 < all.len() { first(i + 1, true) } else { after.unwrap_or([&[]; 4]) };
                let mut partials = s.partials.write(base + slot + i);
                gather_chunk(&kv, task, &upcoming, weights, &mut p.kv, &mut p.attend, &mut partials);
                weights = &mut weights[weights_len(task, group)..];
            }
            bytes += all.iter().flatten().map(|read| read.bytes().iter().sum::<usize>()).sum::<usize>();
            slot = last;
        }
        bytes
    }

    /// The shares of the largest weight below which each KV head leaves values unread, if any of `heads` does; 0 for others.
    fn floors(&self, heads: Range<usize>) -> Option<Vec<f32>> {
        let below = |kv_head: usize| match heads.contains(&kv_head) {
            true => self.scratch.selections[kv_head].read().unwrap_or_else(|e| e.into_inner()).skip_below,
            false => 0.0,
        };
        heads.clone().any(|h| below(h) > 0.0).then(|| (0..self.scratch.selections.len()).map(below).collect())
    }

    /// As [`Pass::attend`] where heads leave values unread: all keys come first, for the weight of a token counts against the
    /// largest one of the whole head.
    fn attend_above(
        &self,
        worker: &Worker<'_>,
        p: &mut Private,
        l: usize,
        work: &Work<'_>,
        below: &[f32],
    ) -> usize {
        let (s, d, group) = (self.scratch, self.model.config.head_dim, self.model.config.group());
        let Work { tasks, mine, base, .. } = work;
        // Where the weights of each task begin.
        let (mut room, mut bytes) = (vec![0], 0);
        for i in mine.clone() {
            let kv_head = tasks[i].0;
            let kv = self.cache.head(l, kv_head);
            let queries = s.queries.read_stripe(kv_head);
            let queries = &queries[..group * d];
            kv.prepare(queries, &mut p.kv);
            let all: Vec<_> = reads(&kv, work.pieces(i)).collect();
            let start = room[i - mine.start];
            room.push(start + weights_len(&all, group));
            if p.weights.len() < start + weights_len(&all, group) {
                p.weights.resize(start + weights_len(&all, group), 0.0);
            }
            let mut partials = s.partials.write(base + i);
            score_chunk(queries, &kv, &all, &[], &mut p.kv, &mut p.weights[start..], &mut partials);
            let mut largest = s.largest.write(base + i);
            for (largest, partial) in largest.iter_mut().zip(partials.chunks_exact(partial::stride(d))) {
                *largest = partial[0];
            }
            bytes += all.iter().map(|read| read.bytes()[0]).sum::<usize>();
        }
        s.count(bytes as u64, 0, 0);
        p.clock.lap(Op::Attention, || bytes);
        if !self.heads_are_single_tasks() {
            self.barrier(worker, p);
        }
        let (mut values, mut counted, mut floors) = (0, 0, Vec::new());
        for i in mine.clone() {
            let kv_head = tasks[i].0;
            let kv = self.cache.head(l, kv_head);
            floors.clear();
            floors.resize(group, f32::NEG_INFINITY);
            for slots in work.slots(kv_head) {
                let largest = s.largest.read_range(slots.start * group..slots.end * group);
                for (h, &x) in largest.iter().enumerate() {
                    floors[h % group] = floors[h % group].max(x);
                }
            }
            for (floor, own) in floors.iter_mut().zip(s.largest.read_stripe(base + i).iter()) {
                // In terms of the weights of this task, `exp(z - own)`.
                *floor = below[kv_head] * kv.kernels().exp(*floor - own);
            }
            let weights = &mut p.weights[room[i - mine.start]..];
            let mut partials = s.partials.write(base + i);
            let all: Vec<_> = reads(&kv, work.pieces(i)).collect();
            let read = gather_above(&kv, &all, &floors, weights, &mut p.kv, &mut p.attend, &mut partials);
            values += read;
            // The values of a head that leaves none unread were counted with its keys.
            counted += if below[kv_head] > 0.0 { read } else { 0 };
        }
        s.count(counted as u64, 0, 0);
        values
    }
}
