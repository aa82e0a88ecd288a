-- Who has ordered at least twice, and not any more in the time that is looked back.
SELECT customer_id AS profile_id
FROM orders
WHERE status = 'completed' AND placed_at <= :now
GROUP BY customer_id
HAVING count(*) >= 2 AND max(placed_at) < :now - :lookback
