"use strict";
// The knapsack of spectrim.allocate: for each weight one choice, with the least distortion in all, within a limit on the cost.
// A price of cost (Lagrange) bounds the distortion from below and leaves of each weight the few choices that a better solution can have; of these
// every combination is looked at that no other beats in cost and distortion (Nemhauser and Ullmann, 1969). As in the library the result is at most
// 0.01 % above the least distortion; where the combinations become too many, how far above it may be is returned.

const GAP = 1e-4;
const WORK = 4e5; // partial combinations kept at once, over all weights

// Choices that cost less or distortion less than every other: costs C ascending, distortions H descending, places I in the lists given.
function frontier(costs, distortions) {
  const order = costs.map((_, index) => index).sort((a, b) => costs[a] - costs[b] || distortions[a] - distortions[b]);
  const item = { C: [], H: [], I: [] };
  for (const index of order) {
    if (item.H.length && distortions[index] >= item.H[item.H.length - 1]) continue;
    item.C.push(costs[index]);
    item.H.push(distortions[index]);
    item.I.push(index);
  }
  item.hull = hull(item);
  return item;
}

// Places of the lower convex hull, and the distortion saved for each unit of cost from the one before to each.
function hull({ C, H }) {
  const rate = (a, b) => (H[a] - H[b]) / (C[b] - C[a]);
  const places = [];
  for (let place = 0; place < C.length; place++) {
    while (places.length > 1 && rate(places.at(-2), places.at(-1)) <= rate(places.at(-1), place)) places.pop();
    places.push(place);
  }
  return { places, rates: places.map((place, index) => (index ? rate(places[index - 1], place) : Infinity)) };
}

const sum = (items, picks, table) => picks.reduce((total, pick, index) => total + items[index][table][pick], 0);

// The choices that distortion and price times cost together make smallest.
function picksAt(items, price) {
  return items.map(({ hull: { places, rates } }) => {
    let [low, high] = [0, places.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (rates[middle] > price) low = middle;
      else high = middle - 1;
    }
    return places[low];
  });
}

// The lowest price at which the choices fit, by bisection: what fits, what fits no more just below it, and the bound that the price proves.
function priced(items, limit) {
  const rates = items.flatMap(({ hull: { rates } }) => [rates[1], rates.at(-1)]).filter((rate) => rate > 0 && rate < Infinity);
  let [less, more] = [Math.log(Math.min(...rates)) - 1, Math.log(Math.max(...rates)) + 1];
  let [picks, over] = [picksAt(items, Math.exp(more)), picksAt(items, Math.exp(less))];
  for (let round = 0; round < 60; round++) {
    const middle = (less + more) / 2;
    const found = picksAt(items, Math.exp(middle));
    if (sum(items, found, "C") <= limit) [more, picks] = [middle, found];
    else [less, over] = [middle, found];
  }
  const price = Math.exp(more);
  return { picks, over, price, bound: sum(items, picks, "H") - price * (limit - sum(items, picks, "C")) };
}

// Spend what is left of the limit: first on the choices just below the price, then each time on the weight whose distortion falls most.
function fill(items, picks, over, limit) {
  const filled = [...picks];
  let left = limit - sum(items, filled, "C");
  over.forEach((place, index) => {
    const more = items[index].C[place] - items[index].C[picks[index]];
    if (more > 0 && more <= left) [filled[index], left] = [place, left - more];
  });
  for (;;) {
    let [best, gain, place] = [-1, 0, 0];
    items.forEach(({ C, H }, index) => {
      let [from, to] = [filled[index], C.length - 1];
      while (from < to) {
        const middle = (from + to + 1) >> 1;
        if (C[middle] - C[filled[index]] <= left) from = middle;
        else to = middle - 1;
      }
      if (H[filled[index]] - H[from] > gain) [best, gain, place] = [index, H[filled[index]] - H[from], from];
    });
    if (best < 0) return filled;
    left -= items[best].C[place] - items[best].C[filled[best]];
    filled[best] = place;
  }
}

// Look for a solution with less distortion than `most`. A solution's distortion is the bound, plus what each choice is off the best one at the price,
// plus the price of what is left of the limit: so choices and combinations that are off by more than most - bound are out.
function search(items, limit, price, bound, most, states) {
  const room = most - bound;
  const core = items.map(({ C, H }) => {
    const values = C.map((cost, place) => H[place] + price * cost);
    const least = Math.min(...values);
    return values.map((value, place) => ({ place, off: value - least, cost: C[place] })).filter(({ off }) => off < room);
  });
  const order = items.map((_, index) => index).filter((index) => core[index].length > 1).sort((a, b) => core[a].length - core[b].length);
  const settled = core.filter((choices) => choices.length === 1).reduce((total, [{ cost }]) => total + cost, 0);
  const reach = new Map();
  let [least, greatest] = [0, 0]; // of what comes after
  for (const index of [...order].reverse()) {
    reach.set(index, [least, greatest]);
    least += Math.min(...core[index].map(({ cost }) => cost));
    greatest += Math.max(...core[index].map(({ cost }) => cost));
  }
  let [kept, complete] = [[{ cost: settled, off: 0, before: null, place: 0 }], true];
  for (const index of order) {
    const [after, afterMost] = reach.get(index);
    const made = [];
    for (const state of kept) {
      for (const { place, off, cost } of core[index]) {
        const [total, all] = [state.cost + cost, state.off + off];
        if (total + after > limit || all + price * Math.max(0, limit - total - afterMost) >= room) continue;
        made.push({ cost: total, off: all, before: state, place });
      }
    }
    made.sort((a, b) => a.cost - b.cost || a.off - b.off);
    kept = [];
    let lowest = Infinity; // of distortion, up to a constant
    for (const state of made) {
      const distortion = state.off - price * state.cost;
      if (distortion < lowest) {
        lowest = distortion;
        kept.push(state);
      }
    }
    if (kept.length > states) {
      complete = false;
      kept.sort((a, b) => a.off - b.off);
      kept.length = states;
    }
  }
  if (!kept.length) return { picks: null, complete };
  let state = kept.reduce((best, one) => (one.off - price * one.cost < best.off - price * best.cost ? one : best));
  const picks = core.map((choices) => choices[0].place);
  for (const index of [...order].reverse()) [picks[index], state] = [state.place, state.before];
  return { picks, complete };
}

// items: from `frontier`. Returns {picks: places in the lists given to it, distortion, gap}, or null where nothing fits.
function knapsack(items, limit) {
  const result = (picks, gap) => ({ picks: picks.map((place, index) => items[index].I[place]), distortion: sum(items, picks, "H"), gap });
  const [first, last] = [items.map(() => 0), items.map(({ C }) => C.length - 1)];
  if (sum(items, first, "C") > limit) return null;
  if (sum(items, last, "C") <= limit) return result(last, 0);
  const { picks, over, price, bound } = priced(items, limit);
  let best = fill(items, picks, over, limit);
  for (const states of [WORK / 100, WORK].map((work) => Math.min(20000, Math.ceil(work / items.length)))) {
    const distortion = sum(items, best, "H");
    if (distortion - bound <= GAP * distortion) return result(best, (distortion - bound) / distortion);
    const found = search(items, limit, price, bound, distortion * (1 - GAP), states);
    if (found.picks) best = found.picks;
    if (found.complete) return result(best, found.picks ? 0 : GAP);
  }
  const distortion = sum(items, best, "H");
  return result(best, (distortion - bound) / distortion);
}
