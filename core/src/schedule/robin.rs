//! Deficit round robin (Shreedhar and Varghese, 1995) over queues by weight, plain round robin over the lanes inside.
//! Only queues with a lane that can start something are in the ring; whoever changes that says so.

use alloc::{collections::VecDeque, vec::Vec};

/// Cost units that a queue of weight 1 may spend in one turn.
pub const QUANTUM: u32 = 8;

#[derive(Debug, Default)]
struct Queue {
    weight: u32,
    deficit: u32,
    in_ring: bool,
    lanes: VecDeque<u32>,
}

/// The ring of queues. Queues and lanes are numbered by their owner.
#[derive(Debug, Default)]
pub struct Robin {
    queues: Vec<Queue>,
    ring: VecDeque<u32>,
}

impl Robin {
    fn queue(&mut self, queue: u32) -> &mut Queue {
        if self.queues.len() <= queue as usize {
            self.queues.resize_with(queue as usize + 1, || Queue {
                weight: 1,
                ..Queue::default()
            });
        }
        &mut self.queues[queue as usize]
    }

    /// Sets a queue's share.
    pub fn set_weight(&mut self, queue: u32, weight: u16) {
        self.queue(queue).weight = u32::from(weight.max(1));
    }

    /// A lane can start something. The caller adds a lane once until it is taken out.
    pub fn add(&mut self, queue: u32, lane: u32) {
        let target = self.queue(queue);
        target.lanes.push_back(lane);
        if !target.in_ring {
            target.in_ring = true;
            self.ring.push_back(queue);
        }
    }

    /// Lanes of a queue that can start something.
    pub fn lanes(&self, queue: u32) -> usize {
        self.queues
            .get(queue as usize)
            .map_or(0, |queue| queue.lanes.len())
    }

    /// The queue and lane whose turn it is.
    pub fn front(&self) -> Option<(u32, u32)> {
        let &queue = self.ring.front()?;
        let &lane = self.queues[queue as usize]
            .lanes
            .front()
            .expect("a queue in the ring has a lane");
        Some((queue, lane))
    }

    /// Pays for one task of the queue in front, or passes the turn on and returns false.
    pub fn pay(&mut self, cost: u16) -> bool {
        let &front = self
            .ring
            .front()
            .expect("the caller has looked at the front");
        let queue = &mut self.queues[front as usize];
        let cost = u32::from(cost.max(1));
        if queue.deficit < cost {
            queue.deficit += queue.weight * QUANTUM;
            if self.ring.len() > 1 {
                self.ring.rotate_left(1);
            }
            return false;
        }
        queue.deficit -= cost;
        if queue.lanes.len() > 1 {
            queue.lanes.rotate_left(1);
        }
        true
    }

    /// Takes the lane whose turn it is out of the ring: it cannot start anything now.
    pub fn drop_front_lane(&mut self) {
        let &front = self
            .ring
            .front()
            .expect("the caller has looked at the front");
        let queue = &mut self.queues[front as usize];
        queue.lanes.pop_front();
        if queue.lanes.is_empty() {
            self.leave_ring();
        }
    }

    /// Takes the queue in front out of the ring and returns its lanes one by one through `dropped`.
    pub fn drop_front_queue(&mut self, mut dropped: impl FnMut(u32)) {
        let &front = self
            .ring
            .front()
            .expect("the caller has looked at the front");
        for lane in self.queues[front as usize].lanes.drain(..) {
            dropped(lane);
        }
        self.leave_ring();
    }

    fn leave_ring(&mut self) {
        let front = self
            .ring
            .pop_front()
            .expect("the caller has looked at the front");
        let queue = &mut self.queues[front as usize];
        queue.in_ring = false;
        queue.deficit = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(robin: &mut Robin, tasks: usize, cost: impl Fn(u32) -> u16) -> Vec<u32> {
        let mut served = alloc::vec![0; 4];
        for _ in 0..tasks {
            loop {
                let (_, lane) = robin.front().unwrap();
                if robin.pay(cost(lane)) {
                    served[lane as usize] += 1;
                    break;
                }
            }
        }
        served
    }

    #[test]
    fn shares_follow_weights_and_costs() {
        let mut robin = Robin::default();
        robin.set_weight(0, 1);
        robin.set_weight(1, 3);
        robin.add(0, 0);
        robin.add(1, 1);
        assert_eq!(serve(&mut robin, 3_200, |_| 1), [800, 2_400, 0, 0]);
        let mut robin = Robin::default();
        robin.add(0, 0);
        robin.add(1, 1);
        let served = serve(&mut robin, 1_100, |lane| if lane == 0 { 10 } else { 1 });
        assert!((95..=105).contains(&served[0]), "{served:?}");
    }

    #[test]
    fn lanes_of_one_queue_take_turns() {
        let mut robin = Robin::default();
        for lane in 0..4 {
            robin.add(7, lane);
        }
        assert_eq!(serve(&mut robin, 400, |_| 1), [100; 4]);
        robin.drop_front_lane();
        assert_eq!(robin.lanes(7), 3);
        let mut dropped = Vec::new();
        robin.drop_front_queue(|lane| dropped.push(lane));
        assert_eq!((dropped.len(), robin.front()), (3, None));
    }
}
