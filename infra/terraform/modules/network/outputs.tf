output "private_subnets" {
  description = "Subnets of nodes and pods, one a zone."
  value       = aws_subnet.private[*].id

  # Nodes that start before the way out exists cannot join.
  depends_on = [aws_route.nat, aws_route_table_association.private, aws_vpc_endpoint.s3]
}
